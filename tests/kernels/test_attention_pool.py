"""attention_pool on Triton: kernels/attention_pool.py against condense_core/ops/reference/attention_pool.py."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core import ops
from condense_core.kernels import attention_pool as kernel
from condense_core.kernels import common
from condense_core.ops import reference
from condense_core.ops.arguments import AttentionPoolArgs
from condense_core.ops.backends import REGISTRY

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Against the reference on the same rounded inputs; outputs are averages of RMS-normed rows, of order 1. fp32: another
# order of summation over at most some hundred terms. 16 bits: kernel and reference round once at the end, half a unit
# in the last place each (2^-12, 2^-9 of values up to 8).
TOLERANCES = {
    torch.float32: {"atol": 2e-5, "rtol": 2e-5},
    torch.float16: {"atol": 2e-3, "rtol": 2**-9},
    torch.bfloat16: {"atol": 1.6e-2, "rtol": 2**-6},
}


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)])


def draw(
    lengths: list[int],
    *,
    ratio: int = 4,
    halo: int = 0,
    num_heads: int = 2,
    head_dim: int = 8,
    static: bool = True,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> AttentionPoolArgs:
    """Arguments of the op; rows of very different size, so that a missing norm cannot pass.

    Static queries are the same for every window.
    """
    generator = torch.Generator().manual_seed(0)
    tokens, d = sum(lengths), num_heads * head_dim
    size = torch.linspace(0.2, 8.0, max(tokens, 1))[:tokens, None]
    rows = () if static else (sum(-(-n // ratio) for n in lengths),)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return AttentionPoolArgs(
        x=(normal(tokens, d) * size).to(DEVICE, dtype),
        q=(2 * normal(*rows, num_heads, head_dim)).to(DEVICE, dtype),
        ratio=ratio,
        cu_seqlens=offsets(lengths) if len(lengths) != 1 else None,
        halo=halo,
        scale=head_dim**-0.5,
        norm_weight=(1 + 0.3 * normal(d)).to(DEVICE, dtype),
        window_bias=normal(num_heads, ratio + 2 * halo).to(DEVICE, dtype),
        eps=1e-5,
    )._replace(**changes)


def check(args: AttentionPoolArgs) -> Tensor:
    """The kernel's rows, after they and the log-sum-exps were found right."""
    out, lse = kernel.forward(args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONDENSE_BACKEND", "reference")
        expected, expected_lse = REGISTRY.call("attention_pool", args)
    assert (out.dtype, lse.dtype) == (args.x.dtype, torch.float32)
    torch.testing.assert_close(out, expected, **TOLERANCES[out.dtype], equal_nan=True)
    torch.testing.assert_close(lse, expected_lse, **TOLERANCES[torch.float32])
    return out


# Sequences of one length need no offsets in the kernel. A ratio of 4 meets divisible and odd lengths, 1 makes every
# token its own window, 40 makes every sequence one window, a halo of 5 reaches over several windows of 2.
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


@settings(max_examples=15, deadline=None)
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


@pytest.mark.parametrize("halo", [0, 3])
def test_windows_of_several_chunks(halo: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "CHUNK", 64)
    check(draw([20, 3, 13], ratio=9, halo=halo))


def test_without_weight_and_bias() -> None:
    check(draw([10], norm_weight=None, window_bias=None))


def test_a_bias_may_close_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "CHUNK", 64)
    args = draw([24], ratio=12)
    args.window_bias[:, :8] = float("-inf")  # the first chunks have nothing to look at
    assert check(args).isfinite().all()


def test_strides_do_not_matter() -> None:
    args = draw([10], static=False)
    expected, x = kernel.forward(args)[0], args.x
    changes = {
        "half of a row": {"x": torch.cat([x, x], 1)[:, :16]},
        "columns apart": {"x": x.t().contiguous().t()},
        "channels of queries apart": {"q": torch.stack([args.q, args.q], -1)[..., 0]},
    }
    for name, change in changes.items():
        assert torch.equal(kernel.forward(args._replace(**change))[0], expected), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("halo", [0, 2])
def test_a_bad_token_spoils_only_windows_that_see_it(bad: float, halo: int) -> None:
    args = draw([16, 8], halo=halo)
    clean, _ = kernel.forward(args)
    args.x[6, 3] = bad  # in window 1, tokens 4 to 7; with a halo of 2 also in window 2, tokens 6 to 13
    out, _ = kernel.forward(args)
    seen = [1, 2] if halo else [1]
    others = [row for row in range(6) if row not in seen]
    assert out[seen].isnan().any(1).all()
    assert torch.equal(out[others], clean[others])


def test_the_same_bits_every_time() -> None:
    args = draw([21, 3], halo=2)
    assert torch.equal(kernel.forward(args)[0], kernel.forward(args)[0])


@settings(max_examples=6, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=2, max_size=5),
    ratio=st.integers(1, 6),
    halo=st.integers(0, 4),
    random=st.randoms(),
)
def test_sequences_may_be_packed_in_any_order(lengths: list[int], ratio: int, halo: int, random: Any) -> None:
    args = draw(lengths, ratio=ratio, halo=halo, head_dim=4)
    order = random.sample(range(len(lengths)), len(lengths))
    parts = args.x.split(lengths)
    pieces = kernel.forward(args)[0].split([-(-n // ratio) for n in lengths])
    shuffled = args._replace(x=torch.cat([parts[s] for s in order]), cu_seqlens=offsets([lengths[s] for s in order]))
    assert torch.equal(kernel.forward(shuffled)[0], torch.cat([pieces[s] for s in order]))


@settings(max_examples=6, deadline=None)
@given(tokens=st.integers(1, 12), ratio=st.integers(1, 6), size=st.floats(0.01, 100.0))
def test_zero_queries_give_the_mean_and_the_norm_forgets_the_size(tokens: int, ratio: int, size: float) -> None:
    args = draw([tokens], ratio=ratio, head_dim=4)
    r = reference.rms_norm(args.x, args.norm_weight, args.eps)
    means = torch.stack([window.mean(0) for window in r.split(ratio)])
    actual, _ = kernel.forward(args._replace(q=torch.zeros_like(args.q), window_bias=None))
    torch.testing.assert_close(actual, means, **TOLERANCES[torch.float32])
    scaled, _ = kernel.forward(args._replace(x=args.x * size, eps=args.eps * size * size))
    torch.testing.assert_close(scaled, kernel.forward(args)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("halo", [0, 1])
def test_through_the_public_op(halo: int) -> None:
    """Forward and backward, on Triton both."""
    args = draw([9, 4], halo=halo, head_dim=4, static=False)
    x, q = args.x.requires_grad_(), args.q.requires_grad_()
    rest = {name: value for name, value in args._asdict().items() if name not in ("x", "q")}
    out, expected = ops.attention_pool(x, q, **rest), reference.attention_pool(x, q, **rest)
    torch.testing.assert_close(out, expected, **TOLERANCES[torch.float32])
    actual, wanted = (torch.autograd.grad(rows.square().sum(), (x, q)) for rows in (out, expected))
    for a, w in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, w, atol=1e-4, rtol=1e-4)


def test_offsets_are_not_captured_into_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its replays would read host memory that is gone. One sequence, or several of one length, need no copy."""
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cu_seqlens differ between sequences while a CUDA graph is captured"):
        common.upload(torch.zeros(2), cuda)
    x = SimpleNamespace(device=cuda, __len__=lambda: 14)
    for offsets_of_one_length in ([0, 7, 14], [0, 14]):
        (cu_seqlens, rows), count, _ = kernel.packing(x, torch.tensor(offsets_of_one_length), 4)
        assert cu_seqlens is None
        assert rows is None
        assert count == 4
    with pytest.raises(RuntimeError, match="cu_seqlens differ"):
        kernel.packing(x, torch.tensor([0, 6, 14]), 4)


def test_rows_too_wide_for_a_chunk_are_declined() -> None:
    assert kernel.unsupported(draw([1], num_heads=1, head_dim=16_384)) is None
    assert "16384" in str(kernel.unsupported(draw([1], num_heads=1, head_dim=16_400)))
