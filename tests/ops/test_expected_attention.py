"""query_moments and expected_attention: the reference against slow oracles, the public functions against bad input."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core import ops
from condense_core.ops import reference

TOLERANCE = {"atol": 1e-10, "rtol": 1e-10}  # fp64 against Python's floats: two orders of the same sums


def rotation_matrix(cos: Tensor, sin: Tensor) -> Tensor:
    """`R` with `R x = cos x + sin rotate_half(x)`, entry by entry."""
    d = len(cos)
    matrix = torch.diag(cos)
    for i in range(d // 2):
        matrix[i, i + d // 2] = -sin[i]
        matrix[i + d // 2, i] = sin[i + d // 2]
    return matrix


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_query_moments_against_a_loop() -> None:
    batch, heads, tokens, d, sink = 2, 2, 12, 6, 2
    p, angle = draw(batch, heads, tokens, d), draw(tokens, d // 2, seed=1).repeat(1, 2)
    cos, sin = 1.2 * angle.cos(), 1.2 * angle.sin()
    q = torch.stack([p[:, :, i] @ rotation_matrix(cos[i], sin[i]).T for i in range(tokens)], 2)
    bounds = torch.tensor([[0, 12], [3, 9]])
    mu, cov = reference.query_moments(q, cos[None], sin[None], sink, bounds)
    for b, (start, stop) in enumerate(bounds.tolist()):
        for h in range(heads):
            rows = [p[b, h, i] for i in range(start + sink, stop)]
            mean = sum(rows) / len(rows)
            torch.testing.assert_close(mu[b, h], mean, **TOLERANCE)
            spread = sum(torch.outer(row - mean, row - mean) for row in rows) / len(rows)
            torch.testing.assert_close(cov[b, h], spread, **TOLERANCE)


@pytest.mark.parametrize("with_v", [True, False])
def test_expected_attention_against_a_loop(with_v: bool) -> None:
    batch, kv_heads, group, tokens, d, sink, scale, epsilon = 2, 2, 3, 9, 4, 2, 0.4, 0.01
    k, v = draw(batch, kv_heads, tokens, d), draw(batch, kv_heads, tokens, d, seed=1)
    mu, root = draw(batch, kv_heads * group, d, seed=2), draw(batch, kv_heads * group, d, d, seed=3)
    cov = root @ root.mT
    angle = draw(d // 2, seed=4).repeat(2)
    cos, sin = 0.7 * angle.cos(), 0.7 * angle.sin()
    bounds = torch.tensor([[0, 9], [2, 8]])
    scores = reference.expected_attention(k, v if with_v else None, mu, cov, cos, sin, scale, epsilon, sink, bounds)
    turn = rotation_matrix(cos, sin)
    for b, (start, stop) in enumerate(bounds.tolist()):
        for g in range(kv_heads):
            expected = torch.full((tokens,), -math.inf, dtype=torch.float64)
            expected[start : start + sink] = math.inf
            expected[start + sink : stop] = 0.0
            for h in range(g * group, (g + 1) * group):
                mean, spread = turn @ mu[b, h], turn @ cov[b, h] @ turn.T
                weights = [
                    math.exp(float(scale * key @ mean + scale**2 * key @ spread @ key / 2))
                    for key in k[b, g, start + sink : stop]
                ]
                for i, weight in enumerate(weights, start + sink):
                    expected[i] += weight / sum(weights) / group
            if with_v:
                for i in range(start + sink, stop):
                    expected[i] = (expected[i] + epsilon) * v[b, g, i].norm()
            torch.testing.assert_close(scores[b, g], expected, **TOLERANCE)


def test_expected_attention_is_the_mean_of_exponentials_under_the_model() -> None:
    """What the closed form stands for: the average of exp(scale q.k) over many queries drawn from the normal model."""
    torch.manual_seed(0)
    k, mu, root = torch.randn(1, 1, 6, 4), torch.randn(1, 1, 4), 0.5 * torch.randn(4, 4)
    queries = mu[0] + torch.randn(400_000, 4) @ root.T
    sampled = (0.5 * queries @ k[0, 0].T).exp().mean(0)
    scores = ops.expected_attention(k, None, mu, (root @ root.T)[None, None], scale=0.5, sink=0)
    torch.testing.assert_close(scores[0, 0], sampled / sampled.sum(), atol=3e-3, rtol=2e-2)


def moments_arguments() -> dict[str, Any]:
    return {"q": torch.randn(2, 4, 10, 8), "cos": torch.randn(1, 10, 8), "sin": torch.randn(1, 10, 8)}


def attention_arguments() -> dict[str, Any]:
    cache, square = torch.randn(2, 2, 10, 8), torch.randn(2, 4, 8, 8)
    rotation = {"mean_cos": torch.randn(8), "mean_sin": torch.randn(8)}
    return {"k": cache, "v": cache.clone(), "mu": torch.randn(2, 4, 8), "cov": square, **rotation}


BAD_MOMENTS = [
    ({"q": [1.0]}, TypeError, "q is a list"),
    ({"q": torch.ones(2, 4, 10, 8).int()}, TypeError, "q has dtype torch.int32"),
    ({"q": torch.ones(4, 10, 8)}, ValueError, r"q has shape \[4, 10, 8\], expected \[B, G, N, D\]"),
    ({"cos": None}, ValueError, "cos is None, expected a tensor, as sin is given"),
    ({"sin": None}, ValueError, "sin is None, expected a tensor, as cos is given"),
    ({"cos": torch.ones(3, 10, 8)}, ValueError, r"cos has shape \[3, 10, 8\], expected \[B or 1, N, D\]"),
    ({"sin": torch.ones(1, 9, 8)}, ValueError, r"sin has shape \[1, 9, 8\]"),
    ({"cos": "x"}, TypeError, "cos is a str"),
    ({"sin": torch.ones(1, 10, 8).long()}, TypeError, "sin has dtype torch.int64"),
    ({"sink": -1}, ValueError, "sink is -1"),
    ({"sink": 1.5}, TypeError, "sink is 1.5"),
    ({"bounds": torch.zeros(1, 2).long()}, ValueError, r"bounds has shape \[1, 2\], expected \[B, 2\] = \[2, 2\]"),
    ({"bounds": torch.zeros(2, 2)}, TypeError, "bounds has dtype torch.float32"),
    ({"q": torch.ones(2, 4, 10, 8, device="meta")}, ValueError, "cos is on cpu, expected meta, where q is"),
]
BAD_ATTENTION = [
    ({"k": torch.ones(2, 10, 8)}, ValueError, "k has shape"),
    ({"v": torch.ones(2, 2, 9, 8)}, ValueError, r"v has shape \[2, 2, 9, 8\], expected \[2, 2, 10, 8\], as k has"),
    ({"v": torch.ones(2, 2, 10, 8).half()}, TypeError, "v has dtype torch.float16, expected torch.float32"),
    ({"mu": torch.ones(2, 4, 8).half()}, TypeError, "mu has dtype torch.float16, expected one of float32"),
    ({"mu": torch.ones(2, 8)}, ValueError, r"mu has shape \[2, 8\]"),
    ({"mu": torch.ones(2, 3, 8)}, ValueError, "mu has 3 heads .* expected a multiple of k's 2"),
    ({"cov": torch.ones(2, 4, 8)}, ValueError, r"cov has shape \[2, 4, 8\], expected \[B, H, D, D\] = \[2, 4, 8, 8\]"),
    ({"cov": 3}, TypeError, "cov is a int"),
    ({"mean_sin": None}, ValueError, "mean_sin is None"),
    ({"mean_cos": torch.ones(1, 8)}, ValueError, r"mean_cos has shape \[1, 8\], expected \[D\] = \[8\]"),
    ({"scale": math.nan}, ValueError, "scale is nan"),
    ({"epsilon": -1e-3}, ValueError, "epsilon is -0.001"),
    ({"epsilon": "0"}, TypeError, "epsilon is '0'"),
    ({"epsilon": True}, TypeError, "epsilon is True"),
    ({"sink": True}, TypeError, "sink is True"),
    ({"bounds": [[0, 1]]}, TypeError, "bounds is a list"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_MOMENTS)
def test_bad_input_to_query_moments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.query_moments(**{**moments_arguments(), **change})


@pytest.mark.parametrize(("change", "error", "message"), BAD_ATTENTION)
def test_bad_input_to_expected_attention(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.expected_attention(**{**attention_arguments(), **change})


def test_an_odd_width_has_no_halves_to_rotate() -> None:
    with pytest.raises(ValueError, match="cos is given with D = 7, expected an even D"):
        ops.query_moments(torch.ones(1, 1, 3, 7), torch.ones(1, 3, 7), torch.ones(1, 3, 7))


def test_both_pass_opcheck() -> None:
    given = moments_arguments()
    arguments = (given["q"], given["cos"], given["sin"], 4, torch.tensor([[0, 10], [2, 9]]))
    torch.library.opcheck(torch.ops.condense_core.query_moments.default, arguments)
    given = attention_arguments()
    tensors = [given[name] for name in ("k", "v", "mu", "cov", "mean_cos", "mean_sin")]
    torch.library.opcheck(torch.ops.condense_core.expected_attention.default, (*tensors, 0.3, 0.0, 4, None))


@pytest.mark.parametrize("dynamic", [False, True])
def test_both_trace_into_one_graph(dynamic: bool) -> None:
    def scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return 2 * ops.expected_attention(k, v, *ops.query_moments(q, sink=2), sink=2)

    q, k, v = torch.randn(1, 4, 10, 8), torch.randn(1, 2, 10, 8), torch.randn(1, 2, 10, 8)
    compiled = torch.compile(scores, fullgraph=True, backend="eager", dynamic=dynamic)
    torch.testing.assert_close(compiled(q, k, v), scores(q, k, v))
