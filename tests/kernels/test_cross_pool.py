"""cross_pool on Triton: kernels/cross_pool.py against condense_core/ops/reference/cross_pool.py."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core import ops
from condense_core.kernels import cross_pool as kernel
from condense_core.kernels import cross_pool_backward
from condense_core.kernels.launch import Target, launch
from condense_core.ops import reference
from condense_core.ops.arguments import CrossPoolArgs
from condense_core.ops.backends import REGISTRY

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Against the reference in fp32 on the same rounded inputs. fp32: another order of summation over at most some hundred
# terms. fp16: q * w, and p for the second product, are rounded, 2^-12 of each. The logits, sums of head_dim products
# of order 1, then err by about 2^-12 of their size (they reach 10: at most 2.4e-3), a p by that share of itself, and
# an output, an average of rows of order 1, by at most 2e-3 and the rounding of the result. bf16: 2^3 times as much.
# "large logits", of some hundreds, are only known to that many times 6e-8, and so are the weights.
TOLERANCES = {
    torch.float32: {"atol": 2e-5, "rtol": 2e-5},
    torch.float16: {"atol": 2e-3, "rtol": 2**-9},
    torch.bfloat16: {"atol": 1.6e-2, "rtol": 2**-6},
    "large logits": {"atol": 1e-4, "rtol": 1e-4},
}
LSE_TOLERANCES = {
    torch.float32: {"atol": 2e-5, "rtol": 2e-5},
    torch.float16: {"atol": 2.4e-3, "rtol": 0.0},
    torch.bfloat16: {"atol": 2e-2, "rtol": 0.0},
    "large logits": {"atol": 1e-4, "rtol": 1e-4},
}


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int64)


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
    """Arguments of the op; rows of very different size, so that a missing norm cannot pass."""
    generator = torch.Generator().manual_seed(seed)
    tokens, d = sum(lengths), num_heads * head_dim
    size = torch.linspace(0.2, 8.0, max(tokens, 1))[:tokens, None]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return CrossPoolArgs(
        x=(normal(tokens, d) * size).to(DEVICE, dtype),
        q=(2 * normal(sum(queries), num_heads, head_dim)).to(DEVICE, dtype),
        cu_seqlens=None if len(lengths) == 1 else offsets(lengths),
        cu_queries=None if len(lengths) == 1 else offsets(queries),
        scale=head_dim**-0.5,
        norm_weight=(1 + 0.3 * normal(d)).to(DEVICE, dtype),
        eps=1e-5,
    )._replace(**changes)


def upcast(args: CrossPoolArgs, dtype: torch.dtype = torch.float32) -> CrossPoolArgs:
    """The same values in a dtype in which the reference rounds nothing."""
    return CrossPoolArgs(*(v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for v in args))


def specification(args: CrossPoolArgs) -> tuple[Tensor, Tensor]:
    """Rows and log-sum-exps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONDENSE_BACKEND", "reference")
        out, lse = REGISTRY.call("cross_pool", args)
    return out, lse


def check(args: CrossPoolArgs, tolerances: str | None = None) -> Tensor:
    """The kernels' rows, after they and the log-sum-exps were found right."""
    dtype = args.x.dtype
    out, lse = kernel.forward(args)
    expected, expected_lse = specification(upcast(args))
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out.float(), expected, **TOLERANCES[tolerances or dtype])
    torch.testing.assert_close(lse, expected_lse, **LSE_TOLERANCES[tolerances or dtype])
    return out


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


@settings(max_examples=10, deadline=None)
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
    """Beyond 88, where exp overflows, or all below -88, where a sum without the maximum is 0; padding counts as 0."""
    monkeypatch.setattr(kernel, "_SPLIT", 16)
    args = draw([20, 37], [4, 2], num_heads=1, head_dim=4, norm_weight=None, scale=50.0 * sign)
    args = args._replace(x=args.x.abs() + 1, q=args.q.abs() + 1)
    _, lse = kernel.forward(args)
    assert bool((lse > 88).all() if sign > 0 else (lse < -88).all())
    check(args, "large logits")


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
    monkeypatch.setattr(kernel, "_SPLIT", 32)
    target = Target(90, 3, 0)  # that of the interpreter
    assert kernel.splits_of(sum(n > 0 for n in queries), 16, 16, offsets(lengths), target) == (3, 32)
    check(draw(lengths, queries, num_heads=1, head_dim=16, dtype=dtype))


@settings(deadline=None)
@given(num_sms=st.integers(1, 132), longest=st.integers(0, 32_768), programs=st.integers(0, 5_000))
def test_splits_cover_the_tokens_and_leave_none_empty(num_sms: int, longest: int, programs: int) -> None:
    splits, length = kernel.splits_of(programs, 32, 128, torch.tensor([0, 0, longest]), Target(90, num_sms, 1))
    assert splits >= 1
    assert splits * length >= longest > (splits - 1) * length - (longest == 0)
    assert splits == 1 or splits * programs <= 3 * num_sms or programs == 0


def test_tile_tables_against_a_loop() -> None:
    own, met = [3, 0, 9, 4], [5, 2, 0, 7]
    tables, totals = kernel.tile_tables(
        torch.device("cpu"), (offsets(own), offsets(met), 4), (offsets(met), offsets(own), 3)
    )
    for table, total, (a, b, block) in zip(tables, totals, ((own, met, 4), (met, own, 3)), strict=True):
        a_ends, b_ends = offsets(a).tolist(), offsets(b).tolist()
        expected = [
            [row, a_ends[s + 1], b_ends[s], b_ends[s + 1]]
            for s in range(4)
            for row in range(a_ends[s], a_ends[s + 1], block)
        ]
        assert table.tolist() == expected
        assert total == len(expected)
    # A single sequence sends nothing to the device.
    assert kernel.tile_tables(torch.device("cpu"), (offsets([9]), offsets([0]), 4)) == ([None], [3])


def test_fp32_is_as_accurate_as_the_reference() -> None:
    """Against fp64, the kernels err no more than a few times what the fp32 reference does: no product is in tf32."""
    args = draw([200], [8], head_dim=32, seed=3)
    exact, plain = specification(upcast(args, torch.float64)), specification(args)
    for a, p, e in zip(kernel.forward(args), plain, exact, strict=True):
        error, usual = (float((t.double() - e).abs().max() / e.abs().max()) for t in (a, p))
        assert error <= 4 * usual + 2**-22


def test_fp16_rows_of_any_size() -> None:
    """Norms of hidden states differ by orders of magnitude."""
    sizes = torch.logspace(0, math.log10(2_000), 64)[:, None]
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(2)) * sizes
    args = draw([64], [8], head_dim=16, dtype=torch.float16, norm_weight=None, eps=1e-6)
    check(args._replace(x=x.to(DEVICE, torch.float16)))


@pytest.mark.parametrize(
    ("smallest", "largest", "eps"),
    [
        pytest.param(2e-6, 1e-2, 1e-14, id="beyond-the-largest-number"),  # 1 / rms up to 5e5
        pytest.param(3e4, 4e4, 1e-6, id="below-the-smallest-normal-number"),  # down to 2.5e-5
    ],
)
def test_p_over_rms_keeps_to_the_range_of_fp16(smallest: float, largest: float, eps: float) -> None:
    sizes = torch.logspace(math.log10(smallest), math.log10(largest), 64)[:, None]
    signs = torch.randint(0, 2, (64, 32), generator=torch.Generator().manual_seed(2)) * 2 - 1
    args = draw([64], [8], head_dim=16, dtype=torch.float16, norm_weight=None, eps=eps)
    # Weights of very different size.
    args = args._replace(x=(signs * sizes).to(DEVICE, torch.float16), q=(4 * args.q).half())
    expected, _ = specification(upcast(args))
    # Entries of r are 1 or -1: p and the result are rounded, 2^-12 of 1 each, and the logits are exact.
    torch.testing.assert_close(kernel.forward(args)[0].float(), expected, atol=1e-3, rtol=0.0)


def test_strides_do_not_matter() -> None:
    args = draw([10, 7], [4, 3])
    expected, x = kernel.forward(args)[0], args.x
    changes = {
        "half of a row": {"x": torch.cat([x, x], 1)[:, :16]},
        "columns apart": {"x": x.t().contiguous().t()},
        "channels of queries apart": {"q": torch.stack([args.q, args.q], -1)[..., 0]},
        "weights apart": {"norm_weight": torch.stack([args.norm_weight, args.norm_weight], -1)[..., 0]},
    }
    for name, change in changes.items():
        assert torch.equal(kernel.forward(args._replace(**change))[0], expected), name


def test_rows_too_far_apart_are_copied() -> None:
    """Offsets within a tile have 32 bits."""
    near = torch.empty(17, 32, device="meta")[:, :16]
    far = torch.empty(17 * 2**23, device="meta").as_strided((17, 16), (2**23, 1))
    assert kernel.near_rows(near) is near
    assert kernel.near_rows(far).stride() == (16, 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_a_bad_token_spoils_only_its_sequence(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_SPLIT", 16)
    args = draw([6, 40, 9], [3, 2, 3])
    clean, clean_lse = kernel.forward(args)
    args.x[6 + 17, 3] = bad
    out, lse = kernel.forward(args)
    assert out[3:5].isnan().any(1).all()
    others = [0, 1, 2, 5, 6, 7]
    assert torch.equal(out[others], clean[others])
    assert torch.equal(lse[others], clean_lse[others])


def test_a_bad_query_spoils_only_its_row() -> None:
    args = draw([40], [5])
    clean, _ = kernel.forward(args)
    args.q[2, 1, 3] = float("nan")  # head 1, columns 8 to 15
    out, _ = kernel.forward(args)
    assert out[2, 8:].isnan().all()
    assert torch.equal(out[:, :8], clean[:, :8])
    assert torch.equal(out[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def test_the_same_bits_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_SPLIT", 16)
    args = draw([50, 3], [4, 2], num_heads=1)
    assert torch.equal(kernel.forward(args)[0], kernel.forward(args)[0])


@settings(max_examples=8, deadline=None)
@given(tokens=st.integers(1, 40), queries=st.integers(1, 5), size=st.floats(0.01, 100.0), random=st.randoms())
def test_invariances(tokens: int, queries: int, size: float, random: Any) -> None:
    """Order of the tokens is not seen, nor their common size; order of the queries is that of the rows."""
    args = draw([tokens], [queries], head_dim=4)
    out, lse = kernel.forward(args)
    shuffle, order = random.sample(range(tokens), tokens), random.sample(range(queries), queries)
    changed = args._replace(x=size * args.x[shuffle], q=args.q[order], eps=1e-5 * size * size)
    actual, actual_lse = kernel.forward(changed)
    torch.testing.assert_close(actual, out[order], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(actual_lse, lse[order], atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize(("lengths", "queries"), [([20], [3]), ([9, 0, 14], [2, 1, 3])], ids=["one-sequence", "a-pack"])
def test_through_the_public_op(lengths: list[int], queries: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, on Triton both."""
    launched = []

    def spy(function: Any, *args: Any, **options: Any) -> None:
        launched.append(function.__name__)
        launch(function, *args, **options)

    monkeypatch.setattr(kernel, "launch", spy)
    monkeypatch.setattr(cross_pool_backward, "launch", spy)
    args = draw(lengths, queries)
    names = ("x", "q", "norm_weight")
    leaves = {name: getattr(args, name).requires_grad_() for name in names}
    rest = {name: value for name, value in args._asdict().items() if name not in names}
    out, expected = (function(**leaves, **rest) for function in (ops.cross_pool, reference.cross_pool))
    torch.testing.assert_close(out, expected, **TOLERANCES[torch.float32])
    actual, wanted = (torch.autograd.grad(rows.square().sum(), list(leaves.values())) for rows in (out, expected))
    for a, w in zip(actual, wanted, strict=True):
        size = max(1.0, float(w.abs().max()))
        torch.testing.assert_close(a / size, w / size, **TOLERANCES[torch.float32])
    kernels = {"_cross_kernel", "_cross_queries_kernel", "_cross_tokens_kernel", "_rms_norm_backward_kernel"}
    assert kernels <= set(launched)


@pytest.mark.usefixtures("triton_backend")
def test_opcheck() -> None:
    args = draw([9, 0, 14], [2, 1, 3])
    for name in ("x", "q", "norm_weight"):
        getattr(args, name).requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.condense_core.cross_pool.default, tuple(args), test_utils=tests)


def test_shapes_beyond_the_kernels_are_declined() -> None:
    def reason(num_heads: int, head_dim: int) -> str | None:
        return kernel.unsupported(draw([1], [1], num_heads=num_heads, head_dim=head_dim))

    assert reason(64, 256) is None
    assert "more than 256" in str(reason(32, 512))
    assert "more than 16384" in str(reason(16_385, 1))
