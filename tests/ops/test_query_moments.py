"""query_moments: the specification against a loop, the public function, and its registration."""

from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core import ops
from condense_core.ops import reference
from tests.ops.oracles import rotation_matrix

TOLERANCE = {"atol": 1e-10, "rtol": 1e-10}  # fp64 against fp64: two orders of the same sums


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_it_undoes_the_rotation_and_averages() -> None:
    batch, heads, tokens, head_dim, sink = 2, 2, 12, 6, 2
    p, angle = draw(batch, heads, tokens, head_dim), draw(tokens, head_dim // 2, seed=1).repeat(1, 2)
    cos, sin = 1.2 * angle.cos(), 1.2 * angle.sin()
    q = torch.stack([p[:, :, i] @ rotation_matrix(cos[i], sin[i]).T for i in range(tokens)], 2)
    bounds = torch.tensor([[0, 12], [3, 9]])
    mu, cov = reference.query_moments(q=q, cos=cos[None], sin=sin[None], sink=sink, bounds=bounds)
    for b, (start, stop) in enumerate(bounds.tolist()):
        for h in range(heads):
            rows = [p[b, h, i] for i in range(start + sink, stop)]
            mean = sum(rows) / len(rows)
            torch.testing.assert_close(mu[b, h], mean, **TOLERANCE)
            spread = sum(torch.outer(row - mean, row - mean) for row in rows) / len(rows)
            torch.testing.assert_close(cov[b, h], spread, **TOLERANCE)


def test_queries_that_were_not_rotated_are_taken_as_they_are() -> None:
    q = draw(1, 2, 9, 5)
    mu, cov = reference.query_moments(q=q, sink=0)
    torch.testing.assert_close(mu, q.mean(2), **TOLERANCE)
    for h in range(2):
        torch.testing.assert_close(cov[0, h], torch.cov(q[0, h].T, correction=0), **TOLERANCE)


def test_no_real_token_after_the_sinks_gives_zeros() -> None:
    mu, cov = ops.query_moments(torch.randn(2, 1, 5, 4), sink=4, bounds=torch.tensor([[1, 5], [3, 3]]))
    assert not mu.any()
    assert not cov.any()


def good() -> dict[str, Any]:
    return {"q": torch.randn(2, 4, 10, 8), "cos": torch.randn(1, 10, 8), "sin": torch.randn(1, 10, 8)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param({"q": [1.0]}, TypeError, "q is a list", id="q of list"),
        pytest.param({"q": torch.ones(2, 4, 10, 8).int()}, TypeError, "q has dtype torch.int32", id="dtype of q"),
        pytest.param(
            {"q": torch.ones(4, 10, 8)},
            ValueError,
            r"q has shape \[4, 10, 8\], expected \[B, G, N, D\]",
            id="rank of q",
        ),
        pytest.param({"cos": None}, ValueError, "cos is None, expected a tensor, as sin is given", id="sin alone"),
        pytest.param({"sin": None}, ValueError, "sin is None, expected a tensor, as cos is given", id="cos alone"),
        pytest.param(
            {"cos": torch.ones(3, 10, 8)},
            ValueError,
            r"cos has shape \[3, 10, 8\], expected \[B or 1, N, D\]",
            id="another batch",
        ),
        pytest.param({"sin": torch.ones(1, 9, 8)}, ValueError, r"sin has shape \[1, 9, 8\]", id="fewer tokens"),
        pytest.param({"cos": "x"}, TypeError, "cos is a str", id="cos of text"),
        pytest.param({"sin": torch.ones(1, 10, 8).long()}, TypeError, "sin has dtype torch.int64", id="sin of ints"),
        pytest.param({"sink": -1}, ValueError, "sink is -1", id="negative sink"),
        pytest.param({"sink": 1.5}, TypeError, "sink is 1.5", id="sink of float"),
        pytest.param(
            {"bounds": torch.zeros(1, 2).long()},
            ValueError,
            r"bounds has shape \[1, 2\], expected \[B, 2\] = \[2, 2\]",
            id="bounds of one",
        ),
        pytest.param({"bounds": torch.zeros(2, 2)}, TypeError, "bounds has dtype torch.float32", id="bounds of floats"),
        pytest.param(
            {"q": torch.ones(2, 4, 10, 8, device="meta")},
            ValueError,
            "cos is on cpu, expected meta, where q is",
            id="two devices",
        ),
        pytest.param(
            {"q": torch.ones(1, 1, 3, 7), "cos": torch.ones(1, 3, 7), "sin": torch.ones(1, 3, 7)},
            ValueError,
            "cos is given with D = 7, expected an even D",
            id="an odd width has no halves",
        ),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.query_moments(**{**good(), **change})


def test_it_passes_opcheck() -> None:
    given = good()
    arguments = (given["q"], given["cos"], given["sin"], 4, torch.tensor([[0, 10], [2, 9]]))
    torch.library.opcheck(torch.ops.condense_core.query_moments.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_it_is_traced_without_a_break(dynamic: bool) -> None:
    def moments(q: Tensor) -> tuple[Tensor, Tensor]:
        mu, cov = ops.query_moments(q, sink=2)
        return 2 * mu, cov + 1

    q = torch.randn(1, 4, 10, 8)
    compiled = torch.compile(moments, fullgraph=True, backend="eager", dynamic=dynamic)
    for actual, expected in zip(compiled(q), moments(q), strict=True):
        assert torch.equal(actual, expected)
