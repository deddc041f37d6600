"""The reference ops against an independent oracle: one Python loop per window and head, in fp64."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from condense_core import ops
from condense_core.ops import reference
from condense_core.ops.reference import windows

# Absolute and relative, against the oracle on the same rounded inputs. Outputs are averages of RMS-normed
# rows, of order 1. float32: sums of up to some hundred terms at 6e-8 each. The 16-bit types are accumulated
# in float32, so what remains is one rounding of the result, 2^-9 (bfloat16) or 2^-12 (float16) of it, and a
# factor of 2 to spare.
TOLERANCES = {
    torch.float64: {"atol": 1e-12, "rtol": 1e-12},
    torch.float32: {"atol": 5e-6, "rtol": 5e-6},
    torch.bfloat16: {"atol": 1e-4, "rtol": 2**-8},
    torch.float16: {"atol": 1e-4, "rtol": 2**-11},
}

# Lengths that meet every branch: a full last window, a short one, one token, nothing, shorter than the ratio.
LENGTHS = [[12], [13], [1], [3, 0, 9, 1], [0, 0, 5], [8, 4, 4], [2, 31, 6]]


def oracle_rms(x: Tensor, norm_weight: Tensor | None, eps: float) -> list[list[float]]:
    rows = []
    for row in x.double().tolist():
        norm = math.sqrt(sum(value * value for value in row) / len(row) + eps)
        weight = [1.0] * len(row) if norm_weight is None else norm_weight.double().tolist()
        rows.append([value / norm * w for value, w in zip(row, weight, strict=True)])
    return rows


def oracle_attend(
    query: Tensor, rows: list[list[float]], scale: float | None, bias: list[list[float]] | None
) -> list[float]:
    """One output row: query [H, d/H] over the given rows; bias [H][len(rows)]."""
    out: list[float] = []
    heads, head_dim = query.shape
    factor = 1 / math.sqrt(head_dim) if scale is None else scale
    for h in range(heads):
        own = [row[h * head_dim : (h + 1) * head_dim] for row in rows]
        q = query[h].double().tolist()
        logits = [factor * sum(a * b for a, b in zip(q, r, strict=True)) for r in own]
        if bias is not None:
            logits = [logit + b for logit, b in zip(logits, bias[h], strict=True)]
        top = max(logits, default=0.0)
        weights = [math.exp(logit - top) for logit in logits]
        total = sum(weights)
        out += [sum(w / total * r[c] for w, r in zip(weights, own, strict=True)) for c in range(head_dim)]
    return out


def oracle_attention_pool(
    x: Tensor,
    q: Tensor,
    lengths: list[int],
    *,
    ratio: int,
    halo: int = 0,
    scale: float | None = None,
    norm_weight: Tensor | None = None,
    window_bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    rows = oracle_rms(x, norm_weight, eps)
    out, start = [], 0
    for length in lengths:
        for first in range(0, length, ratio):
            places = [place for place in range(-halo, ratio + halo) if 0 <= first + place < length]
            window = [rows[start + first + place] for place in places]
            bias = None
            if window_bias is not None:
                bias = [[float(row[halo + place]) for place in places] for row in window_bias.double()]
            query = q[len(out)] if q.dim() == 3 else q
            out.append(oracle_attend(query, window, scale, bias))
        start += length
    return torch.tensor(out, dtype=torch.float64).reshape(len(out), x.shape[1])


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)])


def count_windows(lengths: list[int], ratio: int) -> int:
    return sum(math.ceil(length / ratio) for length in lengths)


def draw(
    lengths: list[int],
    ratio: int,
    heads: int,
    head_dim: int,
    *,
    static: bool,
    dtype: torch.dtype,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, q and norm_weight; rows of very different size, so that a missing norm cannot pass."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.linspace(0.2, 8.0, max(sum(lengths), 1))[: sum(lengths), None]
    x = torch.randn(sum(lengths), heads * head_dim, generator=generator) * size
    k = () if static else (count_windows(lengths, ratio),)
    q = 2 * torch.randn(*k, heads, head_dim, generator=generator)
    norm_weight = 1 + 0.3 * torch.randn(heads * head_dim, generator=generator)
    return x.to(dtype), q.to(dtype), norm_weight.to(dtype)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, **TOLERANCES[dtype])


# 4 and 5 meet divisible and odd lengths, 1 makes every token its own window, 64 makes every sequence one
# window.
@pytest.mark.parametrize("ratio", [1, 4, 5, 64])
@pytest.mark.parametrize("halo", [0, 3])
@pytest.mark.parametrize("static", [True, False], ids=["static", "per-window"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_attention_pool_matches_the_oracle(lengths: list[int], static: bool, halo: int, ratio: int) -> None:
    x, q, norm_weight = draw(lengths, ratio, 3, 5, static=static, dtype=torch.float32)
    options = {"ratio": ratio, "halo": halo, "norm_weight": norm_weight}
    actual = ops.attention_pool(x, q, cu_seqlens=cumulative(lengths), **options)
    assert_close(actual, oracle_attention_pool(x, q, lengths, **options), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("halo", [0, 2])
def test_attention_pool_dtypes(dtype: torch.dtype, halo: int) -> None:
    x, q, norm_weight = draw([7, 20], 4, 2, 8, static=False, dtype=dtype)
    options = {"ratio": 4, "halo": halo, "norm_weight": norm_weight, "scale": 0.7, "eps": 1e-3}
    actual = ops.attention_pool(x, q, cu_seqlens=cumulative([7, 20]), heads=2, **options)
    assert_close(actual, oracle_attention_pool(x, q, [7, 20], **options), dtype)


@pytest.mark.parametrize("ratio", [4, 50])
@pytest.mark.parametrize("halo", [0, 2, 60])
def test_window_bias_counts_places_from_the_unclipped_window(ratio: int, halo: int) -> None:
    lengths = [8, 3, 9]
    x, q, norm_weight = draw(lengths, ratio, 2, 4, static=True, dtype=torch.float32)
    bias = torch.randn(2, ratio + 2 * halo, generator=torch.Generator().manual_seed(1))
    options = {"ratio": ratio, "halo": halo, "norm_weight": norm_weight, "window_bias": bias}
    actual = ops.attention_pool(x, q, cu_seqlens=cumulative(lengths), **options)
    assert_close(actual, oracle_attention_pool(x, q, lengths, **options), torch.float32)
    assert not torch.equal(actual, ops.attention_pool(x, q, cu_seqlens=cumulative(lengths), ratio=ratio, halo=halo))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 11), min_size=1, max_size=4),
    ratio=st.integers(1, 12),
    halo=st.integers(0, 12),
    heads=st.integers(1, 3),
    static=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_attention_pool_properties(
    lengths: list[int], ratio: int, halo: int, heads: int, static: bool, seed: int
) -> None:
    x, q, norm_weight = draw(lengths, ratio, heads, 2, static=static, dtype=torch.float32, seed=seed)
    options = {"ratio": ratio, "halo": halo, "norm_weight": norm_weight}
    offsets = ops.window_offsets(cumulative(lengths), ratio)
    out = ops.attention_pool(x, q, cu_seqlens=cumulative(lengths), **options)
    assert_close(out, oracle_attention_pool(x, q, lengths, **options), torch.float32)

    # A sequence alone gives the rows it gives in company, which also shows that their order does not matter.
    for s, part in enumerate(x.split(lengths)):
        own = slice(int(offsets[s]), int(offsets[s + 1]))
        alone = ops.attention_pool(part, q if static else q[own], **options)
        torch.testing.assert_close(alone, out[own], **TOLERANCES[torch.float32])

    # An average of its rows: no output leaves their range.
    rows = reference.rms_norm(x, norm_weight, 1e-6)
    if len(out):
        assert out.max() <= rows.max() + 1e-5
        assert out.min() >= rows.min() - 1e-5


def test_a_permutation_of_sequences_permutes_the_rows() -> None:
    lengths, order = [5, 0, 8, 3], [2, 3, 0, 1]
    x, q, _ = draw(lengths, 4, 2, 4, static=False, dtype=torch.float32)
    parts, queries = x.split(lengths), q.split([2, 0, 2, 1])
    out = ops.attention_pool(x, q, ratio=4, halo=1, cu_seqlens=cumulative(lengths)).split([2, 0, 2, 1])
    permuted = ops.attention_pool(
        torch.cat([parts[s] for s in order]),
        torch.cat([queries[s] for s in order]),
        ratio=4,
        halo=1,
        cu_seqlens=cumulative([lengths[s] for s in order]),
    )
    assert torch.equal(permuted, torch.cat([out[s] for s in order]))


@pytest.mark.parametrize("length", [12, 14])
def test_zero_queries_are_mean_pooling(length: int) -> None:
    x = torch.randn(length, 6, generator=torch.Generator().manual_seed(0))
    rows = torch.nn.functional.rms_norm(x, (6,), eps=1e-6)
    expected = torch.stack([part.mean(0) for part in rows.split(4)])
    torch.testing.assert_close(ops.attention_pool(x, torch.zeros(2, 3), ratio=4), expected)


def test_the_view_of_full_windows_equals_the_gather() -> None:
    x, q, _ = draw([16, 8], 4, 2, 4, static=False, dtype=torch.float32)
    r = reference.rms_norm(x, None, 1e-6)
    index, _ = windows.window_tokens(24, 4, torch.tensor([0, 16, 24]), 0)
    view = windows.gather_windows(r, index)
    assert view.data_ptr() == r.data_ptr(), "full windows must not be copied"
    # One token more makes a short last window, so that all of them are gathered.
    packed = ops.attention_pool(torch.cat([x, x[:1]]), torch.cat([q, q[:1]]), ratio=4)
    torch.testing.assert_close(ops.attention_pool(x, q, ratio=4), packed[:-1], **TOLERANCES[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_input_gives_the_same_rows(dtype: torch.dtype) -> None:
    x, q, norm_weight = draw([11], 4, 2, 4, static=False, dtype=dtype)
    every_other = torch.empty(22, 16, dtype=dtype)[::2, ::2].copy_(x)
    transposed = x.t().contiguous().t()
    q_strided = q.transpose(0, 2).contiguous().transpose(0, 2)
    expected = ops.attention_pool(x, q, ratio=4, norm_weight=norm_weight)
    for strided in (every_other, transposed):
        assert not strided.is_contiguous()
        actual = ops.attention_pool(strided, q_strided, ratio=4, norm_weight=norm_weight)
        # Not bit for bit: the order of summation follows the strides.
        torch.testing.assert_close(actual, expected, **TOLERANCES[dtype])


def test_ratio_and_halo_beyond_the_longest_sequence_change_nothing_and_cost_nothing() -> None:
    lengths = [3, 5]
    x, q, _ = draw(lengths, 5, 2, 4, static=True, dtype=torch.float32)
    options = {"cu_seqlens": cumulative(lengths)}
    exact = ops.attention_pool(x, q, ratio=5, halo=5, **options)
    assert torch.equal(ops.attention_pool(x, q, ratio=10**30, halo=10**30, **options), exact)


def test_no_tokens_give_no_rows() -> None:
    x = torch.zeros(0, 8, requires_grad=True)
    for cu_seqlens in (None, torch.tensor([0]), torch.tensor([0, 0, 0])):
        out = ops.attention_pool(x, torch.ones(2, 4), ratio=4, halo=2, cu_seqlens=cu_seqlens)
        assert out.shape == (0, 8)
        out.sum().backward()


def test_nan_stays_in_its_own_sequence() -> None:
    lengths = [5, 6]
    x, q, _ = draw(lengths, 4, 2, 4, static=True, dtype=torch.float32)
    x[7] = float("nan")
    x.requires_grad_()
    out = ops.attention_pool(x, q, ratio=4, halo=3, cu_seqlens=cumulative(lengths))
    assert torch.isfinite(out[:2]).all()
    assert out[2:].isnan().all()
    out[:2].sum().backward()
    assert torch.isfinite(x.grad[:5]).all()


def test_large_logits_do_not_overflow() -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    q = torch.full((1, 4), 1e4)
    out = ops.attention_pool(x, q, ratio=4, scale=10.0)
    rows = torch.nn.functional.rms_norm(x, (4,), eps=1e-6)
    expected = torch.stack([part[part.sum(-1).argmax()] for part in rows.split(4)])
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("halo", [0, 2])
@pytest.mark.parametrize("lengths", [[8], [3, 0, 6]], ids=str)
@pytest.mark.parametrize("static", [True, False], ids=["static", "per-window"])
def test_attention_pool_gradients(lengths: list[int], halo: int, static: bool) -> None:
    x, q, norm_weight = draw(lengths, 4, 2, 2, static=static, dtype=torch.float64)
    bias = torch.randn(2, 4 + 2 * halo, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inputs = [tensor.requires_grad_() for tensor in (x, q, norm_weight, bias)]

    def pool(x: Tensor, q: Tensor, norm_weight: Tensor, window_bias: Tensor) -> Tensor:
        options = {"ratio": 4, "halo": halo, "cu_seqlens": cumulative(lengths)}
        return reference.attention_pool(x, q, norm_weight=norm_weight, window_bias=window_bias, **options)

    assert torch.autograd.gradcheck(pool, inputs)


def test_gradients_keep_their_dtypes_and_match_float64() -> None:
    x, q, norm_weight = draw([9], 4, 2, 4, static=True, dtype=torch.bfloat16)
    single = [x.clone().requires_grad_(), q.float().requires_grad_(), norm_weight.float().requires_grad_()]
    double = [tensor.detach().double().requires_grad_() for tensor in (x, q, norm_weight)]
    ops.attention_pool(single[0], single[1], ratio=4, norm_weight=single[2]).float().square().sum().backward()
    reference.attention_pool(double[0], double[1], ratio=4, norm_weight=double[2]).square().sum().backward()
    for ours, exact in zip(single, double, strict=True):
        assert ours.grad.dtype == ours.dtype
        # The gradient passes through the rounded output once more than the output itself does.
        torch.testing.assert_close(ours.grad.double(), exact.grad, atol=2e-2, rtol=2e-2)


def test_it_compiles_without_a_graph_break() -> None:
    compiled = torch.compile(lambda x, q: ops.attention_pool(x, q, ratio=4), backend="eager", fullgraph=True)
    x, q, _ = draw([12], 4, 2, 4, static=True, dtype=torch.float32)
    torch.testing.assert_close(compiled(x, q), ops.attention_pool(x, q, ratio=4))


# cross_pool


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cross_pool_matches_the_oracle(dtype: torch.dtype) -> None:
    lengths, queries = [7, 0, 1, 12], [3, 2, 1, 0]
    x, q, norm_weight = draw(lengths, 1, 2, 4, static=False, dtype=dtype)
    q = q[:6]
    rows = oracle_rms(x, norm_weight, 1e-6)
    expected, k = [], 0
    for s, end in enumerate(itertools.accumulate(lengths)):
        for _ in range(queries[s]):
            own = rows[end - lengths[s] : end]
            expected.append(oracle_attend(q[k], own, 0.9, None) if own else [0.0] * 8)
            k += 1
    actual = ops.cross_pool(
        x,
        q,
        cu_seqlens=cumulative(lengths),
        cu_queries=cumulative(queries),
        heads=2,
        scale=0.9,
        norm_weight=norm_weight,
    )
    assert_close(actual, torch.tensor(expected, dtype=torch.float64), dtype)
    assert (actual[3:5] == 0).all(), "queries over an empty sequence"


def test_cross_pool_of_one_window_is_attention_pool() -> None:
    x, q, norm_weight = draw([6], 6, 2, 4, static=False, dtype=torch.float32)
    whole = ops.attention_pool(x, q, ratio=6, norm_weight=norm_weight)
    torch.testing.assert_close(ops.cross_pool(x, q, norm_weight=norm_weight), whole, **TOLERANCES[torch.float32])


def test_cross_pool_without_queries_or_tokens() -> None:
    assert ops.cross_pool(torch.ones(3, 8), torch.ones(0, 2, 4)).shape == (0, 8)
    assert torch.equal(ops.cross_pool(torch.ones(0, 8), torch.ones(2, 2, 4)), torch.zeros(2, 8))


def test_cross_pool_gradients() -> None:
    x, q, norm_weight = draw([4, 0, 3], 1, 2, 2, static=False, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (x, q[:4].clone(), norm_weight)]

    def pool(x: Tensor, q: Tensor, norm_weight: Tensor) -> Tensor:
        ends = {"cu_seqlens": torch.tensor([0, 4, 4, 7]), "cu_queries": torch.tensor([0, 2, 3, 4])}
        return reference.cross_pool(x, q, norm_weight=norm_weight, **ends)

    assert torch.autograd.gradcheck(pool, inputs)


# helpers


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_window_offsets(lengths: list[int], dtype: torch.dtype) -> None:
    for ratio in (1, 4, 10**30):
        offsets = ops.window_offsets(cumulative(lengths).to(dtype), ratio)
        assert offsets.dtype == dtype
        assert offsets.diff().tolist() == [math.ceil(length / ratio) for length in lengths]
        assert offsets[0] == 0


@pytest.mark.parametrize(("num_tokens", "ratio", "expected"), [(0, 4, 0), (1, 4, 1), (8, 4, 2), (9, 4, 3), (5, 99, 1)])
def test_num_windows(num_tokens: int, ratio: int, expected: int) -> None:
    assert ops.num_windows(num_tokens, ratio) == expected
