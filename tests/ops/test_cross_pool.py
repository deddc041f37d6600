"""cross_pool: the specification against a loop, the public function, and its registration."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core import ops
from tests.ops.oracles import attend, cumulative, rms_norm

# Absolute and relative, against the oracle on the same rounded inputs. Outputs are averages of RMS-normed rows, of
# order 1. float32: sums of some ten terms at 6e-8 each. The 16-bit types are accumulated in float32, so what remains is
# one rounding of the result, 2^-9 (bfloat16) or 2^-12 (float16) of it, and a factor of 2 to spare.
TOLERANCES = {
    torch.float32: {"atol": 5e-6, "rtol": 5e-6},
    torch.bfloat16: {"atol": 1e-4, "rtol": 2**-8},
    torch.float16: {"atol": 1e-4, "rtol": 2**-11},
}


def draw(tokens: int, queries: int, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x, q of 2 heads and norm_weight; rows of very different size, so that a missing norm cannot pass."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 8, generator=generator) * torch.linspace(0.2, 8.0, tokens)[:, None]
    q = 2 * torch.randn(queries, 2, 4, generator=generator)
    norm_weight = 1 + 0.3 * torch.randn(8, generator=generator)
    return x.to(dtype), q.to(dtype), norm_weight.to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_it_equals_a_walk_query_by_query(dtype: torch.dtype) -> None:
    lengths, queries = [7, 0, 1, 12], [3, 2, 1, 0]
    x, q, norm_weight = draw(sum(lengths), sum(queries), dtype=dtype)
    rows = rms_norm(x, norm_weight, 1e-6)
    expected: list[list[float]] = []
    for s, end in enumerate(itertools.accumulate(lengths)):
        own = rows[end - lengths[s] : end]
        for _ in range(queries[s]):
            expected.append(attend(q[len(expected)], own, 0.9) if own else [0.0] * 8)
    actual = ops.cross_pool(
        x,
        q,
        cu_seqlens=cumulative(lengths),
        cu_queries=cumulative(queries),
        heads=2,
        scale=0.9,
        norm_weight=norm_weight,
    )
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), torch.tensor(expected, dtype=torch.float64), **TOLERANCES[dtype])
    assert (actual[3:5] == 0).all(), "queries over an empty sequence"


def test_one_window_is_attention_pool() -> None:
    x, q, norm_weight = draw(6, 1)
    whole = ops.attention_pool(x, q, ratio=6, norm_weight=norm_weight)
    torch.testing.assert_close(ops.cross_pool(x, q, norm_weight=norm_weight), whole, **TOLERANCES[torch.float32])


def test_without_queries_or_tokens() -> None:
    assert ops.cross_pool(torch.ones(3, 8), torch.ones(0, 2, 4)).shape == (0, 8)
    assert torch.equal(ops.cross_pool(torch.ones(0, 8), torch.ones(2, 2, 4)), torch.zeros(2, 8))


X = torch.ones(10, 8)
Q = torch.ones(3, 2, 4)


@pytest.mark.parametrize(
    ("change", "error", "parts"),
    [
        pytest.param({"q": Q[0]}, ValueError, ["q has shape [2, 4]", "[K, heads, d/heads]"], id="rank of q"),
        pytest.param(
            {"cu_seqlens": torch.tensor([0, 4, 10])},
            ValueError,
            ["cu_queries is None", "2 sequences"],
            id="no cu_queries",
        ),
        pytest.param(
            {"cu_queries": torch.tensor([0, 1, 3])},
            ValueError,
            ["cu_queries is 2 sequences", "1 sequences"],
            id="no cu_seqlens",
        ),
        pytest.param(
            {"cu_queries": torch.tensor([0, 2])}, ValueError, ["cu_queries ends at 2", "expected 3"], id="queries left"
        ),
        pytest.param(
            {"cu_seqlens": torch.tensor([0, 2])}, ValueError, ["cu_seqlens ends at 2", "expected 10"], id="tokens left"
        ),
        pytest.param({"x": X.double()}, TypeError, ["x has dtype torch.float64"], id="x in fp64"),
        pytest.param({"norm_weight": torch.ones(3)}, ValueError, ["norm_weight has shape [3]"], id="weight of 3"),
        pytest.param({"scale": float("-inf")}, ValueError, ["scale is -inf"], id="infinite scale"),
        pytest.param({"eps": -1.0}, ValueError, ["eps is -1.0"], id="negative eps"),
        pytest.param({"heads": 3}, ValueError, ["heads is 3"], id="other heads"),
    ],
)
def test_bad_input_is_named_in_one_line(change: dict[str, Any], error: type[Exception], parts: list[str]) -> None:
    assert ops.cross_pool(X, Q).shape == (3, 8)
    with pytest.raises(error) as caught:
        ops.cross_pool(**{"x": X, "q": Q, **change})
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message
