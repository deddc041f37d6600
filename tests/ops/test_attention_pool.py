"""attention_pool: the specification against a loop, the public function, and its registration."""

from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core import ops
from condense_core.ops import reference
from condense_core.ops.reference.windows import gather_windows, window_tokens
from tests.ops.oracles import attend, cumulative, rms_norm

pytest.importorskip("hypothesis")

from hypothesis import example, given, settings
from hypothesis import strategies as st

# Absolute and relative, against the oracle on the same rounded inputs. Outputs are averages of RMS-normed rows, of
# order 1. float32: sums of up to some hundred terms at 6e-8 each. The 16-bit types are accumulated in float32, so what
# remains is one rounding of the result, 2^-9 (bfloat16) or 2^-12 (float16) of it, and a factor of 2 to spare.
TOLERANCES = {
    torch.float32: {"atol": 5e-6, "rtol": 5e-6},
    torch.bfloat16: {"atol": 1e-4, "rtol": 2**-8},
    torch.float16: {"atol": 1e-4, "rtol": 2**-11},
}


def oracle(
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
    rows = rms_norm(x, norm_weight, eps)
    out, start = [], 0
    for length in lengths:
        for first in range(0, length, ratio):
            places = [place for place in range(-halo, ratio + halo) if 0 <= first + place < length]
            window = [rows[start + first + place] for place in places]
            bias = None
            if window_bias is not None:
                bias = [[float(row[halo + place]) for place in places] for row in window_bias.double()]
            out.append(attend(q[len(out)] if q.dim() == 3 else q, window, scale, bias))
        start += length
    return torch.tensor(out, dtype=torch.float64).reshape(len(out), x.shape[1])


def draw(
    lengths: list[int],
    *,
    ratio: int,
    heads: int = 2,
    head_dim: int = 4,
    per_window: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, q and norm_weight; rows of very different size, so that a missing norm cannot pass."""
    generator = torch.Generator().manual_seed(seed)
    tokens, rows = sum(lengths), sum(ops.num_windows(length, ratio) for length in lengths)
    size = torch.linspace(0.2, 8.0, max(tokens, 1))[:tokens, None]
    x = torch.randn(tokens, heads * head_dim, generator=generator) * size
    q = 2 * torch.randn(*[rows] * per_window, heads, head_dim, generator=generator)
    norm_weight = 1 + 0.3 * torch.randn(heads * head_dim, generator=generator)
    return x.to(dtype), q.to(dtype), norm_weight.to(dtype)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, **TOLERANCES[dtype])


# The examples meet every branch whatever is drawn: full and short last windows, one token, nothing, sequences shorter
# than the ratio; every token its own window, one window of all; halos within a window and beyond its neighbours.
@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 11), min_size=1, max_size=4),
    ratio=st.integers(1, 12),
    halo=st.integers(0, 12),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([1, 2, 5]),
    per_window=st.booleans(),
    seed=st.integers(0, 2**16),
)
@example(lengths=[12], ratio=4, halo=0, heads=3, head_dim=5, per_window=False, seed=0)
@example(lengths=[13], ratio=5, halo=3, heads=3, head_dim=5, per_window=True, seed=0)
@example(lengths=[1], ratio=1, halo=3, heads=3, head_dim=5, per_window=True, seed=0)
@example(lengths=[3, 0, 9, 1], ratio=4, halo=3, heads=3, head_dim=5, per_window=True, seed=0)
@example(lengths=[0, 0, 5], ratio=5, halo=0, heads=3, head_dim=5, per_window=False, seed=0)
@example(lengths=[8, 4, 4], ratio=4, halo=0, heads=3, head_dim=5, per_window=True, seed=0)
@example(lengths=[2, 31, 6], ratio=64, halo=3, heads=3, head_dim=5, per_window=False, seed=0)
def test_any_pack_equals_a_walk_window_by_window(
    lengths: list[int], ratio: int, halo: int, heads: int, head_dim: int, per_window: bool, seed: int
) -> None:
    x, q, norm_weight = draw(lengths, ratio=ratio, heads=heads, head_dim=head_dim, per_window=per_window, seed=seed)
    options = {"ratio": ratio, "halo": halo, "norm_weight": norm_weight}
    offsets = ops.window_offsets(cumulative(lengths), ratio)
    out = ops.attention_pool(x, q, cu_seqlens=cumulative(lengths), **options)
    assert_close(out, oracle(x, q, lengths, **options))

    # A sequence alone gives the rows it gives in company, which also shows that their order does not matter.
    for s, part in enumerate(x.split(lengths)):
        own = slice(int(offsets[s]), int(offsets[s + 1]))
        alone = ops.attention_pool(part, q[own] if per_window else q, **options)
        torch.testing.assert_close(alone, out[own], **TOLERANCES[torch.float32])

    # An average of its rows: no output leaves their range.
    rows = reference.rms_norm(x, norm_weight, 1e-6)
    if len(out):
        assert out.max() <= rows.max() + 1e-5
        assert out.min() >= rows.min() - 1e-5


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("halo", [0, 2])
def test_dtypes_scale_and_eps(dtype: torch.dtype, halo: int) -> None:
    x, q, norm_weight = draw([7, 20], ratio=4, head_dim=8, per_window=True, dtype=dtype)
    options = {"ratio": 4, "halo": halo, "norm_weight": norm_weight, "scale": 0.7, "eps": 1e-3}
    actual = ops.attention_pool(x, q, cu_seqlens=cumulative([7, 20]), heads=2, **options)
    assert_close(actual, oracle(x, q, [7, 20], **options), dtype)


@pytest.mark.parametrize("ratio", [4, 50])
@pytest.mark.parametrize("halo", [0, 2, 60])
def test_window_bias_counts_places_from_the_unclipped_window(ratio: int, halo: int) -> None:
    lengths = [8, 3, 9]
    x, q, norm_weight = draw(lengths, ratio=ratio)
    bias = torch.randn(2, ratio + 2 * halo, generator=torch.Generator().manual_seed(1))
    options = {"ratio": ratio, "halo": halo, "norm_weight": norm_weight, "window_bias": bias}
    actual = ops.attention_pool(x, q, cu_seqlens=cumulative(lengths), **options)
    assert_close(actual, oracle(x, q, lengths, **options))
    assert not torch.equal(actual, ops.attention_pool(x, q, cu_seqlens=cumulative(lengths), ratio=ratio, halo=halo))


def test_the_log_sum_exp_is_that_of_the_logits() -> None:
    x, q, _ = draw([6], ratio=2)
    r = reference.rms_norm(x, None, 1e-5).view(3, 2, 2, 4)  # windows of 2
    logits = 0.7 * torch.einsum("kwhd,hd->kwh", r, q)
    _, lse = reference.attention_pool_with_lse(x=x, q=q, ratio=2, scale=0.7, eps=1e-5)
    torch.testing.assert_close(lse, logits.exp().sum(1).log(), atol=1e-5, rtol=1e-5)


def test_a_permutation_of_sequences_permutes_the_rows() -> None:
    lengths, order = [5, 0, 8, 3], [2, 3, 0, 1]
    x, q, _ = draw(lengths, ratio=4, per_window=True)
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


@pytest.mark.parametrize("length", [pytest.param(12, id="full windows"), pytest.param(14, id="a short last window")])
def test_zero_queries_are_mean_pooling(length: int) -> None:
    x = torch.randn(length, 6, generator=torch.Generator().manual_seed(0))
    rows = torch.nn.functional.rms_norm(x, (6,), eps=1e-6)
    expected = torch.stack([part.mean(0) for part in rows.split(4)])
    torch.testing.assert_close(ops.attention_pool(x, torch.zeros(2, 3), ratio=4), expected)


def test_the_view_of_full_windows_equals_the_gather() -> None:
    x, q, _ = draw([16, 8], ratio=4, per_window=True)
    r = reference.rms_norm(x, None, 1e-6)
    index, _ = window_tokens(24, 4, torch.tensor([0, 16, 24]), 0)
    assert gather_windows(r, index).data_ptr() == r.data_ptr(), "full windows must not be copied"
    # One token more makes a short last window, so that all of them are gathered.
    packed = ops.attention_pool(torch.cat([x, x[:1]]), torch.cat([q, q[:1]]), ratio=4)
    torch.testing.assert_close(ops.attention_pool(x, q, ratio=4), packed[:-1], **TOLERANCES[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_input_gives_the_same_rows(dtype: torch.dtype) -> None:
    x, q, norm_weight = draw([11], ratio=4, per_window=True, dtype=dtype)
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
    x, q, _ = draw([3, 5], ratio=5)
    exact = ops.attention_pool(x, q, ratio=5, halo=5, cu_seqlens=cumulative([3, 5]))
    assert torch.equal(ops.attention_pool(x, q, ratio=10**30, halo=10**30, cu_seqlens=cumulative([3, 5])), exact)


def test_no_tokens_give_no_rows() -> None:
    x = torch.zeros(0, 8, requires_grad=True)
    for cu_seqlens in (None, torch.tensor([0]), torch.tensor([0, 0, 0])):
        out = ops.attention_pool(x, torch.ones(2, 4), ratio=4, halo=2, cu_seqlens=cu_seqlens)
        assert out.shape == (0, 8)
        out.sum().backward()


def test_nan_stays_in_its_own_sequence() -> None:
    x, q, _ = draw([5, 6], ratio=4)
    x[7] = float("nan")
    x.requires_grad_()
    out = ops.attention_pool(x, q, ratio=4, halo=3, cu_seqlens=cumulative([5, 6]))
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


X = torch.ones(10, 8)
Q = torch.ones(2, 4)  # the same for every window
QK = torch.ones(3, 2, 4)  # one for each window at ratio 4


@pytest.mark.parametrize(
    ("change", "error", "parts"),
    [
        pytest.param({"x": [[1.0]]}, TypeError, ["x is a list", "torch.Tensor"], id="x of list"),
        pytest.param(
            {"x": X.double()}, TypeError, ["x has dtype torch.float64", "float32, bfloat16, float16"], id="x in fp64"
        ),
        pytest.param({"x": X.long()}, TypeError, ["x has dtype torch.int64"], id="x of ints"),
        pytest.param({"x": X.to_sparse()}, TypeError, ["x has layout torch.sparse_coo"], id="sparse x"),
        pytest.param({"x": X[0]}, ValueError, ["x has shape [8]", "[T, d]"], id="x of rank 1"),
        pytest.param({"x": X[None]}, ValueError, ["x has shape [1, 10, 8]", "[T, d]"], id="x of rank 3"),
        pytest.param({"x": torch.ones(10, 0)}, ValueError, ["x has shape [10, 0]", "d >= 1"], id="x without width"),
        pytest.param({"q": None}, TypeError, ["q is a NoneType"], id="no q"),
        pytest.param({"q": Q.int()}, TypeError, ["q has dtype torch.int32"], id="q of ints"),
        pytest.param(
            {"q": torch.ones(8)},
            ValueError,
            ["q has shape [8]", "[heads, d/heads] or [K, heads, d/heads]"],
            id="q flat",
        ),
        pytest.param({"q": QK[None]}, ValueError, ["q has shape [1, 3, 2, 4]"], id="q of rank 4"),
        pytest.param({"q": Q.to("meta")}, ValueError, ["q is on meta", "cpu"], id="q elsewhere"),
        pytest.param({"q": torch.ones(3, 2)}, ValueError, ["q has 3 heads", "divisor of d = 8"], id="3 heads"),
        pytest.param({"q": torch.ones(0, 4)}, ValueError, ["q has 0 heads", "divisor of d = 8"], id="no heads"),
        pytest.param({"q": torch.ones(2, 5)}, ValueError, ["q has shape [2, 5]", "d/heads = 4"], id="head_dim"),
        pytest.param({"q": torch.ones(4, 2, 4)}, ValueError, ["q has 4 rows", "expected 3"], id="rows of q"),
        pytest.param({"heads": 4}, ValueError, ["q has shape [2, 4] but heads is 4"], id="other heads"),
        pytest.param({"heads": 2.0}, TypeError, ["heads is 2.0 (float)"], id="heads of float"),
        pytest.param({"ratio": 0}, ValueError, ["ratio is 0", "int >= 1"], id="ratio of 0"),
        pytest.param({"ratio": -4}, ValueError, ["ratio is -4", "int >= 1"], id="negative ratio"),
        pytest.param({"ratio": 4.0}, TypeError, ["ratio is 4.0 (float)", "int >= 1"], id="ratio of float"),
        pytest.param({"ratio": True}, TypeError, ["ratio is True (bool)"], id="ratio of bool"),
        pytest.param({"ratio": "4"}, TypeError, ["ratio is '4' (str)"], id="ratio of text"),
        pytest.param({"halo": -1}, ValueError, ["halo is -1", "int >= 0"], id="negative halo"),
        pytest.param({"halo": False}, TypeError, ["halo is False (bool)"], id="halo of bool"),
        pytest.param({"scale": float("nan")}, ValueError, ["scale is nan", "finite"], id="scale of NaN"),
        pytest.param({"scale": float("inf")}, ValueError, ["scale is inf", "finite"], id="infinite scale"),
        pytest.param({"scale": "1"}, TypeError, ["scale is '1' (str)"], id="scale of text"),
        pytest.param({"eps": 0.0}, ValueError, ["eps is 0.0", "positive"], id="eps of 0"),
        pytest.param({"eps": float("nan")}, ValueError, ["eps is nan", "positive"], id="eps of NaN"),
        pytest.param({"eps": None}, TypeError, ["eps is None"], id="no eps"),
        pytest.param(
            {"norm_weight": torch.ones(4)}, ValueError, ["norm_weight has shape [4]", "[8]"], id="weight of 4"
        ),
        pytest.param(
            {"norm_weight": torch.ones(8).int()}, TypeError, ["norm_weight has dtype torch.int32"], id="weight of ints"
        ),
        pytest.param(
            {"norm_weight": torch.ones(8).to("meta")}, ValueError, ["norm_weight is on meta"], id="weight elsewhere"
        ),
        pytest.param(
            {"window_bias": torch.ones(2, 5)}, ValueError, ["window_bias has shape [2, 5]", "[2, 4]"], id="bias of 5"
        ),
        pytest.param(
            {"window_bias": torch.ones(2, 4), "halo": 1},
            ValueError,
            ["window_bias has shape [2, 4]", "[2, 6]"],
            id="bias without the halo",
        ),
        pytest.param(
            {"window_bias": torch.ones(2, 4).bool()},
            TypeError,
            ["window_bias has dtype torch.bool"],
            id="bias of bools",
        ),
        pytest.param({"cu_seqlens": [0, 10]}, TypeError, ["cu_seqlens is a list", "[S+1]"], id="offsets of list"),
        pytest.param(
            {"cu_seqlens": torch.tensor([0.0, 10.0])},
            TypeError,
            ["cu_seqlens has dtype torch.float32", "int32"],
            id="offsets of floats",
        ),
        pytest.param(
            {"cu_seqlens": torch.tensor([[0, 10]])},
            ValueError,
            ["cu_seqlens has shape [1, 2]", "[S+1]"],
            id="offsets of rank 2",
        ),
        pytest.param(
            {"cu_seqlens": torch.tensor([]).long()}, ValueError, ["cu_seqlens has shape [0]"], id="empty offsets"
        ),
        pytest.param({"cu_seqlens": torch.tensor(10)}, ValueError, ["cu_seqlens has shape []"], id="one number"),
        pytest.param(
            {"cu_seqlens": torch.tensor([1, 10])}, ValueError, ["cu_seqlens starts at 1", "0"], id="offsets from 1"
        ),
        pytest.param(
            {"cu_seqlens": torch.tensor([0, 7, 5, 10])},
            ValueError,
            ["cu_seqlens falls from 7 to 5 at sequence 1"],
            id="falling offsets",
        ),
        pytest.param(
            {"cu_seqlens": torch.tensor([0, 9])}, ValueError, ["cu_seqlens ends at 9", "expected 10"], id="ends early"
        ),
        pytest.param(
            {"cu_seqlens": torch.tensor([0, 11])}, ValueError, ["cu_seqlens ends at 11", "expected 10"], id="ends late"
        ),
    ],
)
def test_bad_input_is_named_in_one_line(change: dict[str, Any], error: type[Exception], parts: list[str]) -> None:
    with pytest.raises(error) as caught:
        ops.attention_pool(**{"x": X, "q": Q, "ratio": 4, **change})
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_the_calls_that_the_bad_ones_differ_from_are_good() -> None:
    assert ops.attention_pool(X, Q, ratio=4).shape == (3, 8)
    assert ops.attention_pool(X, QK, ratio=4, heads=2, cu_seqlens=torch.tensor([0, 10]).int()).shape == (3, 8)
    assert ops.attention_pool(X, Q, ratio=4, halo=1, window_bias=torch.ones(2, 6)).shape == (3, 8)


def test_queries_per_window_are_counted_per_sequence() -> None:
    ends = torch.tensor([0, 5, 10])  # 2 + 2 windows, where one sequence of 10 would have 3
    assert ops.attention_pool(X, torch.ones(4, 2, 4), ratio=4, cu_seqlens=ends).shape == (4, 8)
    with pytest.raises(ValueError, match=r"q has 3 rows .* expected 4"):
        ops.attention_pool(X, QK, ratio=4, cu_seqlens=ends)


def test_offsets_are_checked_before_a_backend_runs_compiled_or_not() -> None:
    for run in (ops.attention_pool, torch.compile(ops.attention_pool, fullgraph=True, backend="eager")):
        with pytest.raises(ValueError, match="cu_seqlens ends at 11, expected 10"):
            run(X, Q, ratio=4, cu_seqlens=torch.tensor([0, 11]))
