"""The cross_pool kernels against the specification, forward and backward."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from condense_core import ops
from condense_core.kernels import cross_pool as kernel
from condense_core.kernels import cross_pool_backward
from condense_core.kernels.launch import Target, launch
from condense_core.ops import reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Against the fp32 reference on the same rounded inputs. fp32: another order of summation over at most some hundred
# terms. fp16: q * w, and p for the second product, are rounded, 2^-12 of each. The logits, sums of head_dim products
# of order 1, then err by about 2^-12 of their size (they reach 10: at most 2.4e-3), a p by that share of itself, and
# an output, an average of rows of order 1, by at most 2e-3 and the rounding of the result. bf16: 2^3 times as much.
TOLERANCES = {
    torch.float32: {"atol": 2e-5, "rtol": 2e-5},
    torch.float16: {"atol": 2e-3, "rtol": 2**-9},
    torch.bfloat16: {"atol": 1.6e-2, "rtol": 2**-6},
}
LSE_TOLERANCES = {
    torch.float32: {"atol": 2e-5, "rtol": 2e-5},
    torch.float16: {"atol": 2.4e-3, "rtol": 0.0},
    torch.bfloat16: {"atol": 2e-2, "rtol": 0.0},
}
# Gradients are divided by their largest entry. To the error of p come those of g * w, of ds and of the rounded output
# in <g, out>: twice that of the output in all.
GRADIENT_TOLERANCES = {
    torch.float32: {"atol": 2e-5, "rtol": 2e-5},
    torch.float16: {"atol": 4e-3, "rtol": 2**-9},
    torch.bfloat16: {"atol": 3.2e-2, "rtol": 2**-6},
}

# Tokens and queries of each sequence. A program holds 16 or 32 rows in fp32, by the longest, and meets 16 at a time:
# one row, part of a tile, several tiles, whole tiles, nothing on either side, on both, and no sequence at all.
PACKS = [
    ([13], [5]),
    ([1], [1]),
    ([64], [32]),
    ([3, 0, 40, 1], [2, 3, 20, 0]),
    ([0, 0, 5], [1, 0, 4]),
    ([2, 75, 6], [0, 40, 1]),
    ([0], [4]),
    ([5], [0]),
    ([0], [0]),
    ([], []),
]


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int64)


def draw(
    lengths: list[int],
    queries: list[int],
    heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of the op; rows of very different size, so that a missing norm cannot pass."""
    generator = torch.Generator().manual_seed(seed)
    tokens, d = sum(lengths), heads * head_dim
    size = torch.linspace(0.2, 8.0, max(tokens, 1))[:tokens, None]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "x": (normal(tokens, d) * size).to(DEVICE, dtype),
        "q": (2 * normal(sum(queries), heads, head_dim)).to(DEVICE, dtype),
        "cu_seqlens": None if len(lengths) == 1 else offsets(lengths),
        "cu_queries": None if len(lengths) == 1 else offsets(queries),
        "scale": head_dim**-0.5,
        "norm_weight": (1 + 0.3 * normal(d)).to(DEVICE, dtype),
        "eps": 1e-5,
    }


def upcast(arguments: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The same values in a dtype in which the reference rounds nothing."""
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def backward(grad: Tensor, out: Tensor, lse: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    rest = {name: value for name, value in arguments.items() if name not in ("x", "q")}
    return cross_pool_backward.backward(grad, arguments["x"], arguments["q"], out, lse, **rest)


def differentiated(grad: Tensor, arguments: dict[str, Any]) -> list[Tensor]:
    """Gradients of x, q and norm_weight by autograd of the specification; an empty one for None."""
    leaves = {name: arguments[name] for name in ("x", "q", "norm_weight") if arguments[name] is not None}
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}
    out = reference.cross_pool(**(arguments | leaves))
    found = list(torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype), materialize_grads=True))
    return found + [grad.new_empty(0)] * (3 - len(found))


def check(arguments: dict[str, Any]) -> None:
    """Output, log-sum-exp and the gradients of a random projection of the output, as they follow one another."""
    dtype = arguments["x"].dtype
    out, lse = kernel.forward(**arguments)
    expected, expected_lse = reference.cross_pool_with_lse(**upcast(arguments))
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out.float(), expected, **TOLERANCES[dtype])
    torch.testing.assert_close(lse, expected_lse, **LSE_TOLERANCES[dtype])

    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out)
    actual = backward(grad, out, lse, arguments)
    if len(out) == 0 and len(arguments["x"]) == 0:  # autograd has nothing to start from
        assert [t.shape for t in actual] == [arguments[name].shape for name in ("x", "q", "norm_weight")]
        assert not actual[2].any()
        return
    for name, a, w in zip(("x", "q", "norm_weight"), actual, differentiated(grad, upcast(arguments)), strict=True):
        size = max(1.0, float(w.abs().max())) if w.numel() else 1.0
        assert a.shape == w.shape, name
        assert a.dtype == (dtype if arguments[name] is None else arguments[name].dtype), name
        tolerances = GRADIENT_TOLERANCES[dtype]
        torch.testing.assert_close(
            a.float() / size, w.float() / size, **tolerances, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize(("lengths", "queries"), PACKS, ids=str)
def test_against_the_reference(lengths: list[int], queries: list[int]) -> None:
    check(draw(lengths, queries, 2, 12))


@pytest.mark.parametrize(("lengths", "queries"), [([70], [40]), ([3, 0, 70], [2, 3, 20])], ids=str)
def test_dtypes(lengths: list[int], queries: list[int], dtype: torch.dtype) -> None:
    check(draw(lengths, queries, 2, 16, dtype=dtype))


# One element, more elements than a product takes at least, all of a power of two, several heads that are not.
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 1), (1, 48), (4, 32), (3, 20)])
def test_widths(heads: int, head_dim: int) -> None:
    check(draw([11], [3], heads, head_dim))


def test_without_norm_weight(dtype: torch.dtype) -> None:
    check(draw([20], [4], 2, 8, dtype=dtype) | {"norm_weight": None})


@pytest.mark.parametrize("scale", [-0.5, 0.0])  # 0 is mean pooling
def test_any_scale(scale: float) -> None:
    check(draw([20, 9], [4, 2], 2, 8) | {"scale": scale})


@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits_do_not_overflow(sign: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond 88, where exp overflows, or all below -88, where a sum without the maximum is 0; padding counts as 0."""
    monkeypatch.setattr(kernel, "_SPLIT", 16)
    arguments = draw([20, 37], [4, 2], 1, 4) | {"norm_weight": None, "scale": 50.0 * sign}
    arguments["x"], arguments["q"] = arguments["x"].abs() + 1, arguments["q"].abs() + 1
    _, lse = kernel.forward(**arguments)
    assert bool((lse > 88).all() if sign > 0 else (lse < -88).all())
    # Logits of some hundreds are only known to that many times 6e-8, and so are the weights.
    for tolerances in (TOLERANCES, GRADIENT_TOLERANCES):
        monkeypatch.setitem(tolerances, torch.float32, {"atol": 1e-4, "rtol": 1e-4})
    check(arguments)


def test_queries_and_weight_may_have_dtypes_of_their_own() -> None:
    arguments = draw([20], [4], 2, 8, dtype=torch.float16)
    check(arguments | {"q": arguments["q"].float(), "norm_weight": arguments["norm_weight"].float()})


# Three splits of one sequence; of a pack, where the shorter ones end within an earlier split or have no token.
@pytest.mark.parametrize(("lengths", "queries"), [([90], [3]), ([90, 20, 0, 33], [2, 3, 1, 0])], ids=str)
def test_splits(lengths: list[int], queries: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_SPLIT", 32)
    target = Target(90, 3, 0)  # that of the interpreter
    assert kernel.splits_of(sum(n > 0 for n in queries), 16, 16, offsets(lengths), target) == (3, 32)
    check(draw(lengths, queries, 1, 16, dtype=dtype))


@pytest.mark.parametrize("num_sms", [1, 8, 132])
def test_splits_cover_the_tokens_and_leave_none_empty(num_sms: int) -> None:
    target = Target(90, num_sms, 1)
    for longest, programs in itertools.product((0, 1, 255, 256, 257, 1_750, 32_768), (0, 1, 32, 128, 5_000)):
        splits, length = kernel.splits_of(programs, 32, 128, torch.tensor([0, 0, longest]), target)
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
    arguments = draw([200], [8], 2, 32, seed=3)
    grad = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    exact, plain = (
        [*reference.cross_pool_with_lse(**values), *differentiated(grad, values)]
        for values in (upcast(arguments, torch.float64), arguments)
    )
    out, lse = kernel.forward(**arguments)
    for a, p, e in zip((out, lse, *backward(grad, out, lse, arguments)), plain, exact, strict=True):
        error, usual = (float((t.double() - e).abs().max() / e.abs().max()) for t in (a, p))
        assert error <= 4 * usual + 2**-22


def test_fp16_rows_of_any_size() -> None:
    """Norms of hidden states differ by orders of magnitude."""
    arguments = draw([64], [8], 2, 16, dtype=torch.float16) | {"norm_weight": None, "eps": 1e-6}
    sizes = torch.logspace(0, math.log10(2_000), 64)[:, None]
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(2)) * sizes
    check(arguments | {"x": x.to(DEVICE, torch.float16)})


@pytest.mark.parametrize(("smallest", "largest", "eps"), [(2e-6, 1e-2, 1e-14), (3e4, 4e4, 1e-6)], ids=str)
def test_p_over_rms_keeps_to_the_range_of_fp16(smallest: float, largest: float, eps: float) -> None:
    """1 / rms up to 5e5, beyond the largest number of fp16, and down to 2.5e-5, below the smallest normal one."""
    arguments = draw([64], [8], 2, 16, dtype=torch.float16) | {"norm_weight": None, "eps": eps}
    sizes = torch.logspace(math.log10(smallest), math.log10(largest), 64)[:, None]
    signs = torch.randint(0, 2, (64, 32), generator=torch.Generator().manual_seed(2)) * 2 - 1
    arguments["x"] = (signs * sizes).to(DEVICE, torch.float16)
    arguments["q"] = (4 * arguments["q"]).half()  # weights of very different size
    expected, _ = reference.cross_pool_with_lse(**upcast(arguments))
    # Entries of r are 1 or -1: p and the result are rounded, 2^-12 of 1 each, and the logits are exact.
    torch.testing.assert_close(kernel.forward(**arguments)[0].float(), expected, atol=1e-3, rtol=0.0)


def test_norm_weights_of_zero(dtype: torch.dtype) -> None:
    """Their own gradient is not zero, though they hide their columns from everything else."""
    arguments = draw([40, 9], [20, 2], 2, 16, dtype=dtype)
    arguments["norm_weight"][::3] = 0.0
    check(arguments)


def test_strided_inputs() -> None:
    plain = draw([10, 7], [4, 3], 2, 8)
    expected, _ = kernel.forward(**plain)
    rows = torch.cat([plain["x"], plain["x"]], 1)[:, :16]  # a row stride of 32
    columns = plain["x"].t().contiguous().t()  # a column stride of 17
    apart = torch.empty(17 * 2**23, dtype=plain["x"].dtype, device="meta").as_strided((17, 16), (2**23, 1))
    assert kernel.near_rows(rows) is rows
    assert kernel.near_rows(apart).stride() == (16, 1)
    queries = torch.stack([plain["q"], plain["q"]], -1)[..., 0]
    weight = torch.stack([plain["norm_weight"], plain["norm_weight"]], -1)[..., 0]
    for change in ({"x": rows}, {"x": columns}, {"q": queries}, {"norm_weight": weight}):
        assert torch.equal(kernel.forward(**(plain | change))[0], expected)
        check(plain | change)
    out, lse = kernel.forward(**plain)
    contiguous = backward(torch.full_like(out, 0.5), out, lse, plain)
    expanded = backward(torch.full_like(out[:1, :1], 0.5).expand_as(out), out, lse, plain)
    assert all(torch.equal(a, b) for a, b in zip(contiguous, expanded, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_token_spoils_only_its_sequence(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_SPLIT", 16)
    arguments = draw([6, 40, 9], [3, 2, 3], 2, 8)
    grad = torch.ones(8, 16, device=DEVICE)
    clean, clean_lse = kernel.forward(**arguments)
    clean_dx, clean_dq, _ = backward(grad, clean, clean_lse, arguments)
    arguments["x"] = arguments["x"].clone()
    arguments["x"][6 + 17, 3] = bad
    out, lse = kernel.forward(**arguments)
    dx, dq, dw = backward(grad, out, lse, arguments)
    assert out[3:5].isnan().any(1).all()
    assert dw.isnan().any()
    others = [0, 1, 2, 5, 6, 7]
    assert torch.equal(out[others], clean[others])
    assert torch.equal(lse[others], clean_lse[others])
    assert torch.equal(dq[others], clean_dq[others])
    tokens = [*range(6), *range(46, 55)]
    assert torch.equal(dx[tokens], clean_dx[tokens])


def test_a_bad_query_spoils_only_its_row() -> None:
    arguments = draw([40], [5], 2, 8)
    clean, _ = kernel.forward(**arguments)
    arguments["q"] = arguments["q"].clone()
    arguments["q"][2, 1, 3] = float("nan")  # head 1, columns 8 to 15
    out, lse = kernel.forward(**arguments)
    assert out[2, 8:].isnan().all()
    assert torch.equal(out[:, :8], clean[:, :8])
    assert torch.equal(out[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])
    dx, dq, _ = backward(torch.ones_like(out), out, lse, arguments)
    assert dq[[0, 1, 3, 4]].isfinite().all()
    assert dx.isnan().all()  # every token is attended by it


def test_the_same_bits_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_SPLIT", 16)
    arguments = draw([50, 3], [4, 2], 1, 8)
    out, lse = kernel.forward(**arguments)
    assert torch.equal(out, kernel.forward(**arguments)[0])
    first, second = (backward(out, out, lse, arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20)), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 20),
    st.integers(0, 99),
)
def test_any_pack(pack: list[tuple[int, int]], heads: int, head_dim: int, seed: int) -> None:
    lengths, queries = [n for n, _ in pack], [k for _, k in pack]
    check(draw(lengths, queries, heads, head_dim, seed=seed))


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.floats(0.01, 100.0), st.randoms())
def test_invariances(tokens: int, queries: int, size: float, random: Any) -> None:
    """Order of the tokens is not seen, nor their common size; order of the queries is that of the rows."""
    arguments = draw([tokens], [queries], 2, 4)
    out, lse = kernel.forward(**arguments)
    shuffle = random.sample(range(tokens), tokens)
    order = random.sample(range(queries), queries)
    changed = arguments | {"x": size * arguments["x"][shuffle], "q": arguments["q"][order], "eps": 1e-5 * size * size}
    actual, actual_lse = kernel.forward(**changed)
    torch.testing.assert_close(actual, out[order], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(actual_lse, lse[order], atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize(("lengths", "queries"), [([20], [3]), ([9, 0, 14], [2, 1, 3])], ids=str)
def test_through_the_public_op(lengths: list[int], queries: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []

    def spy(function: Any, *args: Any, **options: Any) -> None:
        launched.append(function.__name__)
        launch(function, *args, **options)

    monkeypatch.setattr(kernel, "launch", spy)
    monkeypatch.setattr(cross_pool_backward, "launch", spy)
    arguments = draw(lengths, queries, 2, 8)
    leaves = [arguments.pop(name).requires_grad_() for name in ("x", "q", "norm_weight")]

    def run(function: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        out = function(leaves[0], leaves[1], norm_weight=leaves[2], **arguments)
        return out, torch.autograd.grad(out.square().sum(), leaves)

    out, actual = run(ops.cross_pool)
    assert {"_cross_kernel", "_cross_queries_kernel", "_cross_tokens_kernel", "_rms_norm_backward_kernel"} <= set(
        launched
    )
    expected, wanted = run(reference.cross_pool)
    torch.testing.assert_close(out, expected, **TOLERANCES[torch.float32])
    for a, w in zip(actual, wanted, strict=True):
        size = max(1.0, float(w.abs().max()))
        torch.testing.assert_close(a / size, w / size, **GRADIENT_TOLERANCES[torch.float32])


@pytest.mark.usefixtures("triton_backend")
def test_opcheck() -> None:
    arguments = draw([9, 0, 14], [2, 1, 3], 2, 8)
    for name in ("x", "q", "norm_weight"):
        arguments[name].requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.condense_core.cross_pool.default, tuple(arguments.values()), test_utils=tests)
    out, lse = (t.detach() for t in torch.ops.condense_core.cross_pool(*arguments.values()))
    leaves = [v.detach() if isinstance(v, Tensor) else v for v in arguments.values()]
    operands = (torch.ones_like(out), *leaves[:2], out, lse, *leaves[2:])
    torch.library.opcheck(
        torch.ops.condense_core.cross_pool_backward.default, operands, test_utils=("test_schema", "test_faketensor")
    )


def test_shapes_beyond_the_kernels_are_declined() -> None:
    wide = torch.empty(3, 16_384, device="meta")
    assert kernel.unsupported(wide, torch.empty(2, 64, 256, device="meta")) is None
    assert "256" in kernel.unsupported(wide, torch.empty(2, 32, 512, device="meta"))
    wider = torch.empty(3, 16_385, device="meta")
    assert "16384" in kernel.unsupported(wider, torch.empty(2, 16_385, 1, device="meta"))
    assert "256" in cross_pool_backward.unsupported(wide, wide, torch.empty(2, 32, 512, device="meta"))
