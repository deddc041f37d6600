"""attention_pool_backward on Triton: kernels/attention_pool_backward.py against the specification in ops/reference."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core.kernels import attention_pool, attention_pool_backward
from condense_core.kernels import attention_pool_backward as kernel
from condense_core.ops.arguments import AttentionPoolArgs, AttentionPoolBackwardArgs
from condense_core.ops.backends import REGISTRY

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GRADIENTS = ("x", "q", "norm_weight", "window_bias")

# Gradients are divided by their largest entry. fp32: another order of summation over at most some hundred terms. 16
# bits: kernel and reference round once at the end, half a unit in the last place each, and read the rounded output
# (delta), whose error the gradients inherit scaled by their size.
TOLERANCES = {
    torch.float32: {"atol": 2e-5, "rtol": 2e-5},
    torch.float16: {"atol": 2e-3, "rtol": 2**-9},
    torch.bfloat16: {"atol": 1.6e-2, "rtol": 2**-6},
}


def specification(op: str, args: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONDENSE_BACKEND", "reference")
        return REGISTRY.call(op, args)


def draw(
    lengths: list[int],
    *,
    ratio: int = 4,
    halo: int = 0,
    num_heads: int = 2,
    head_dim: int = 8,
    static: bool = True,
    dtype: torch.dtype = torch.float32,
    bias_left: float = 0.0,
    **changes: Any,
) -> AttentionPoolBackwardArgs:
    """Arguments of the op, after a forward pass of the specification, with the gradient of a random projection.

    Static queries are the same for every window; `bias_left` is the bias of the first 8 places; `changes` are of the
    arguments of the forward pass.
    """
    generator = torch.Generator().manual_seed(0)
    tokens, d = sum(lengths), num_heads * head_dim
    size = torch.linspace(0.2, 8.0, max(tokens, 1))[:tokens, None]
    rows = () if static else (sum(-(-n // ratio) for n in lengths),)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    bias = normal(num_heads, ratio + 2 * halo)
    if bias_left:
        bias[:, :8] = bias_left
    args = AttentionPoolArgs(
        x=(normal(tokens, d) * size).to(DEVICE, dtype),
        q=(2 * normal(*rows, num_heads, head_dim)).to(DEVICE, dtype),
        ratio=ratio,
        cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)]) if len(lengths) != 1 else None,
        halo=halo,
        scale=head_dim**-0.5,
        norm_weight=(1 + 0.3 * normal(d)).to(DEVICE, dtype),
        window_bias=bias.to(DEVICE, dtype),
        eps=1e-5,
    )._replace(**changes)
    out, lse = specification("attention_pool", args)
    grad = normal(*out.shape).to(DEVICE, dtype)
    return AttentionPoolBackwardArgs(grad=grad, out=out, lse=lse, **args._asdict())


def check(args: AttentionPoolBackwardArgs) -> tuple[Tensor, ...]:
    """The kernels' gradients, after they were found right; the specification's are tested against autograd."""
    actual = kernel.backward(args)
    expected = specification("attention_pool_backward", args)
    for name, a, e in zip(GRADIENTS, actual, expected, strict=True):
        size = max(1.0, float(e.abs().max())) if e.numel() else 1.0
        assert (a.shape, a.dtype) == (e.shape, e.dtype), name
        torch.testing.assert_close(
            a / size, e / size, **TOLERANCES[args.x.dtype], msg=lambda m, name=name: f"{name}: {m}"
        )
    return actual


# As in test_attention_pool.py: windows of one token, of a whole sequence, and halos over several windows.
@pytest.mark.parametrize(("ratio", "halo"), [(4, 0), (5, 2), (1, 0), (40, 3), (2, 5)])
@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([2, 21, 0, 6], id="a-pack-with-an-empty-sequence"),
        pytest.param([7, 7, 7], id="sequences-of-one-length"),
    ],
)
def test_ratios_and_halos(lengths: list[int], ratio: int, halo: int) -> None:
    check(draw(lengths, ratio=ratio, halo=halo, num_heads=3, head_dim=5))


@pytest.mark.parametrize("lengths", [[1], [0, 0, 5], [0, 0], [12], [13]], ids=str)
def test_few_tokens(lengths: list[int]) -> None:
    check(draw(lengths, static=False))


@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    ratio=st.integers(1, 9),
    halo=st.integers(0, 5),
    num_heads=st.integers(1, 3),
    head_dim=st.integers(1, 10),
    static=st.booleans(),
)
def test_any_pack(lengths: list[int], **shape: Any) -> None:
    check(draw(lengths, **shape))


@pytest.mark.parametrize(("static", "halo"), [(True, 0), (False, 2)], ids=["static", "per-window-with-halo"])
def test_dtypes(static: bool, halo: int, dtype: torch.dtype) -> None:
    check(draw([7, 20], static=static, halo=halo, dtype=dtype))


@pytest.mark.parametrize(("num_heads", "head_dim"), [(1, 1), (1, 48), (8, 16), (6, 20)])
def test_widths(num_heads: int, head_dim: int) -> None:
    check(draw([11], halo=1, num_heads=num_heads, head_dim=head_dim, static=False))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows go chunk by chunk, and rows go round the persistent programs more than once."""
    monkeypatch.setattr(attention_pool, "CHUNK", 64)
    monkeypatch.setattr(attention_pool_backward, "CHUNK", 64)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("halo", [0, 3])
def test_windows_of_several_chunks(halo: int) -> None:
    check(draw([20, 3, 13], ratio=9, halo=halo))


@pytest.mark.usefixtures("small_chunks")
def test_a_bias_may_close_places() -> None:
    """The first chunks have nothing to look at."""
    check(draw([24], ratio=12, bias_left=float("-inf")))


def test_without_weight_and_bias() -> None:
    _, _, dw, dbias = check(draw([10], norm_weight=None, window_bias=None))
    assert dw.numel() == dbias.numel() == 0


def test_strides_do_not_matter() -> None:
    args = draw([10], static=False)
    expected, x = kernel.backward(args), args.x
    changes = {
        "half of a row": {"x": torch.cat([x, x], 1)[:, :16]},
        "columns apart": {"x": x.t().contiguous().t()},
        "channels of queries apart": {"q": torch.stack([args.q, args.q], -1)[..., 0]},
        "half of a row of the gradient": {"grad": torch.cat([args.grad, args.grad], 1)[:, :16]},
    }
    for name, change in changes.items():
        assert all(map(torch.equal, kernel.backward(args._replace(**change)), expected)), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("halo", [0, 2])
def test_a_bad_token_spoils_only_those_that_share_a_window_with_it(bad: float, halo: int) -> None:
    args = draw([16, 8], halo=halo)
    args.x[6, 3] = bad  # in window 1, tokens 4 to 7; with a halo of 2 also in window 2, tokens 6 to 13
    out, lse = specification(
        "attention_pool", AttentionPoolArgs(*(getattr(args, n) for n in AttentionPoolArgs._fields))
    )
    dx, *_ = kernel.backward(args._replace(out=out, lse=lse))
    sharing = range(2, 14) if halo else range(4, 8)
    assert dx[[i for i in range(24) if i not in sharing]].isfinite().all()


def test_the_same_bits_every_time() -> None:
    args = draw([21, 3], halo=2)
    assert all(map(torch.equal, kernel.backward(args), kernel.backward(args)))


def test_rows_too_wide_for_a_chunk_are_declined() -> None:
    assert kernel.unsupported(draw([1], num_heads=1, head_dim=16_384)) is None
    assert "16384" in str(kernel.unsupported(draw([1], num_heads=1, head_dim=16_400)))
