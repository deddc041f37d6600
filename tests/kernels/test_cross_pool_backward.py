"""cross_pool_backward on Triton: kernels/cross_pool_backward.py against autograd of the specification of cross_pool."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core.kernels import cross_pool, cross_pool_backward
from condense_core.ops import reference
from condense_core.ops.arguments import CrossPoolArgs, CrossPoolBackwardArgs

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GRADIENTS = ("x", "q", "norm_weight")

# Gradients are divided by their largest entry. fp32: another order of summation over at most some hundred terms. fp16:
# to the error of p, at most 2e-3 (test_cross_pool.py), come those of g * w, of ds and of the rounded output in
# <g, out>: twice that of the output in all. bf16: 2^3 times as much. "large logits", of some hundreds, are only known
# to that many times 6e-8, and so are the weights.
TOLERANCES = {
    torch.float32: {"atol": 2e-5, "rtol": 2e-5},
    torch.float16: {"atol": 4e-3, "rtol": 2**-9},
    torch.bfloat16: {"atol": 3.2e-2, "rtol": 2**-6},
    "large logits": {"atol": 1e-4, "rtol": 1e-4},
}


def draw(
    lengths: list[int],
    queries: list[int],
    *,
    num_heads: int = 2,
    head_dim: int = 8,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **changes: Any,
) -> CrossPoolArgs:
    """Arguments of the forward pass; rows of very different size, so that a missing norm cannot pass."""
    generator = torch.Generator().manual_seed(seed)
    tokens, d = sum(lengths), num_heads * head_dim
    size = torch.linspace(0.2, 8.0, max(tokens, 1))[:tokens, None]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def offsets(counts: list[int]) -> Tensor | None:
        return None if len(counts) == 1 else torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int64)

    return CrossPoolArgs(
        x=(normal(tokens, d) * size).to(DEVICE, dtype),
        q=(2 * normal(sum(queries), num_heads, head_dim)).to(DEVICE, dtype),
        cu_seqlens=offsets(lengths),
        cu_queries=offsets(queries),
        scale=head_dim**-0.5,
        norm_weight=(1 + 0.3 * normal(d)).to(DEVICE, dtype),
        eps=1e-5,
    )._replace(**changes)


def upcast(args: CrossPoolArgs, dtype: torch.dtype = torch.float32) -> CrossPoolArgs:
    """The same values in a dtype in which the reference rounds nothing."""
    return CrossPoolArgs(*(v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for v in args))


def backward_args(args: CrossPoolArgs, grad: Tensor | None = None) -> CrossPoolBackwardArgs:
    """What follows the kernels' own forward pass, by default with the gradient of a random projection of its rows."""
    out, lse = cross_pool.forward(args)
    if grad is None:
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out)
    return CrossPoolBackwardArgs(grad=grad, out=out, lse=lse, **args._asdict())


def differentiated(grad: Tensor, args: CrossPoolArgs) -> list[Tensor]:
    """Gradients of x, q and norm_weight by autograd of the specification; an empty one for None."""
    names = [name for name in GRADIENTS if getattr(args, name) is not None]
    leaves = {name: getattr(args, name).detach().requires_grad_() for name in names}
    out = reference.cross_pool(**(args._asdict() | leaves))
    found = list(torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype), materialize_grads=True))
    return found + [grad.new_empty(0)] * (3 - len(found))


def check(args: CrossPoolArgs, tolerances: str | None = None) -> None:
    dtype, whole = args.x.dtype, backward_args(args)
    actual = cross_pool_backward.backward(whole)
    if len(whole.grad) == 0 and len(args.x) == 0:  # autograd has nothing to start from
        assert [t.shape for t in actual] == [getattr(args, name).shape for name in GRADIENTS]
        assert not actual[2].any()
        return
    for name, a, w in zip(GRADIENTS, actual, differentiated(whole.grad, upcast(args)), strict=True):
        own = getattr(args, name)
        size = max(1.0, float(w.abs().max())) if w.numel() else 1.0
        assert (a.shape, a.dtype) == (w.shape, dtype if own is None else own.dtype), name
        torch.testing.assert_close(
            a.float() / size,
            w.float() / size,
            **TOLERANCES[tolerances or dtype],
            msg=lambda m, name=name: f"{name}: {m}",
        )


# A program holds 16 or 32 rows in fp32, by the longest sequence, and meets 16 at a time.
@pytest.mark.parametrize(
    ("lengths", "queries"),
    [
        pytest.param([13], [5], id="part-of-a-tile"),
        pytest.param([64], [32], id="whole-tiles"),
        pytest.param([3, 0, 40, 1], [2, 3, 20, 0], id="a-pack"),
        pytest.param([2, 75, 6], [0, 40, 1], id="a-pack-of-several-tiles"),
        pytest.param([0, 0, 5], [1, 0, 4], id="sequences-of-nothing"),
        pytest.param([1], [1], id="one-row"),
        pytest.param([0], [4], id="no-tokens"),
        pytest.param([5], [0], id="no-queries"),
        pytest.param([0], [0], id="neither"),
        pytest.param([], [], id="no-sequence"),
    ],
)
def test_packs(lengths: list[int], queries: list[int]) -> None:
    check(draw(lengths, queries, head_dim=12))


@settings(max_examples=8, deadline=None)
@given(
    pack=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20)), min_size=1, max_size=4),
    num_heads=st.integers(1, 3),
    head_dim=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_any_pack(pack: list[tuple[int, int]], **shape: int) -> None:
    check(draw([n for n, _ in pack], [k for _, k in pack], **shape))


@pytest.mark.parametrize(
    ("lengths", "queries"), [([70], [40]), ([3, 0, 70], [2, 3, 20])], ids=["one-sequence", "a-pack"]
)
def test_dtypes(lengths: list[int], queries: list[int], dtype: torch.dtype) -> None:
    check(draw(lengths, queries, head_dim=16, dtype=dtype))


# One element, more elements than a product takes at least, all of a power of two, several heads that are not.
@pytest.mark.parametrize(("num_heads", "head_dim"), [(1, 1), (1, 48), (4, 32), (3, 20)])
def test_widths(num_heads: int, head_dim: int) -> None:
    check(draw([11], [3], num_heads=num_heads, head_dim=head_dim))


def test_without_norm_weight(dtype: torch.dtype) -> None:
    check(draw([20], [4], dtype=dtype, norm_weight=None))


@pytest.mark.parametrize("scale", [-0.5, 0.0])  # 0 is mean pooling
def test_any_scale(scale: float) -> None:
    check(draw([20, 9], [4, 2], scale=scale))


@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits_do_not_overflow(sign: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_pool, "_SPLIT", 16)
    args = draw([20, 37], [4, 2], num_heads=1, head_dim=4, norm_weight=None, scale=50.0 * sign)
    check(args._replace(x=args.x.abs() + 1, q=args.q.abs() + 1), "large logits")


def test_queries_and_weight_may_have_dtypes_of_their_own() -> None:
    args = draw([20], [4], dtype=torch.float16)
    check(args._replace(q=args.q.float(), norm_weight=args.norm_weight.float()))


@pytest.mark.parametrize(
    ("lengths", "queries"),
    [
        pytest.param([90], [3], id="one-sequence"),
        # The shorter ones end within an earlier split or have no token.
        pytest.param([90, 20, 0, 33], [2, 3, 1, 0], id="a-pack"),
    ],
)
def test_three_splits(
    lengths: list[int], queries: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_pool, "_SPLIT", 32)
    check(draw(lengths, queries, num_heads=1, head_dim=16, dtype=dtype))


def test_fp32_is_as_accurate_as_the_reference() -> None:
    """Against fp64, the kernels err no more than a few times what the fp32 reference does: no product is in tf32."""
    args = draw([200], [8], head_dim=32, seed=3)
    whole = backward_args(args)
    exact, plain = (differentiated(whole.grad, values) for values in (upcast(args, torch.float64), args))
    for a, p, e in zip(cross_pool_backward.backward(whole), plain, exact, strict=True):
        error, usual = (float((t.double() - e).abs().max() / e.abs().max()) for t in (a, p))
        assert error <= 4 * usual + 2**-22


def test_fp16_rows_of_any_size() -> None:
    """Norms of hidden states differ by orders of magnitude."""
    sizes = torch.logspace(0, math.log10(2_000), 64)[:, None]
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(2)) * sizes
    args = draw([64], [8], head_dim=16, dtype=torch.float16, norm_weight=None, eps=1e-6)
    check(args._replace(x=x.to(DEVICE, torch.float16)))


def test_norm_weights_of_zero(dtype: torch.dtype) -> None:
    """Their own gradient is not zero, though they hide their columns from everything else."""
    args = draw([40, 9], [20, 2], head_dim=16, dtype=dtype)
    args.norm_weight[::3] = 0.0
    check(args)


def test_strides_do_not_matter() -> None:
    args = draw([10, 7], [4, 3])
    expected, x = cross_pool_backward.backward(backward_args(args)), args.x
    changes = {
        "half of a row": {"x": torch.cat([x, x], 1)[:, :16]},
        "columns apart": {"x": x.t().contiguous().t()},
        "channels of queries apart": {"q": torch.stack([args.q, args.q], -1)[..., 0]},
        "weights apart": {"norm_weight": torch.stack([args.norm_weight, args.norm_weight], -1)[..., 0]},
    }
    for name, change in changes.items():
        actual = cross_pool_backward.backward(backward_args(args._replace(**change)))
        assert all(map(torch.equal, actual, expected)), name


def test_the_gradient_may_be_expanded() -> None:
    args = draw([10, 7], [4, 3])
    contiguous = backward_args(args, torch.full((7, 16), 0.5, device=DEVICE))
    expanded = contiguous._replace(grad=contiguous.grad[:1, :1].expand(7, 16))
    assert all(map(torch.equal, *(cross_pool_backward.backward(whole) for whole in (contiguous, expanded))))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_a_bad_token_spoils_only_its_sequence(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_pool, "_SPLIT", 16)
    args = draw([6, 40, 9], [3, 2, 3])
    grad = torch.ones(8, 16, device=DEVICE)
    clean_dx, clean_dq, _ = cross_pool_backward.backward(backward_args(args, grad))
    args.x[6 + 17, 3] = bad
    dx, dq, dw = cross_pool_backward.backward(backward_args(args, grad))
    assert dw.isnan().any()
    others = [0, 1, 2, 5, 6, 7]
    assert torch.equal(dq[others], clean_dq[others])
    tokens = [*range(6), *range(46, 55)]
    assert torch.equal(dx[tokens], clean_dx[tokens])


def test_a_bad_query_spoils_only_its_row() -> None:
    args = draw([40], [5])
    args.q[2, 1, 3] = float("nan")
    dx, dq, _ = cross_pool_backward.backward(backward_args(args, torch.ones(5, 16, device=DEVICE)))
    assert dq[[0, 1, 3, 4]].isfinite().all()
    assert dx.isnan().all(), "every token is attended by it"


def test_the_same_bits_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_pool, "_SPLIT", 16)
    whole = backward_args(draw([50, 3], [4, 2], num_heads=1))
    assert all(map(torch.equal, *(cross_pool_backward.backward(whole) for _ in range(2))))


@pytest.mark.usefixtures("triton_backend")
def test_opcheck() -> None:
    whole = backward_args(draw([9, 0, 14], [2, 1, 3]))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.condense_core.cross_pool_backward.default, tuple(whole), test_utils=tests)


def test_shapes_beyond_the_kernels_are_declined() -> None:
    wide = backward_args(draw([1], [1]))._replace(q=torch.empty(1, 32, 512, device="meta"))
    assert "more than 256" in str(cross_pool_backward.unsupported(wide))
