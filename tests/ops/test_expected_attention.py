"""expected_attention: the specification against a loop and a sample, the public function, and its registration."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core import ops
from condense_core.ops import reference
from tests.ops.oracles import rotation_matrix, softmax

TOLERANCE = {"atol": 1e-10, "rtol": 1e-10}  # fp64 against Python's floats: two orders of the same sums


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("with_v", [True, False], ids=["times the norm of v", "without v"])
def test_it_equals_a_walk_key_by_key(with_v: bool) -> None:
    batch, kv_heads, group, tokens, head_dim = 2, 2, 3, 9, 4
    sink, scale, epsilon = 2, 0.4, 0.01
    k, v = draw(batch, kv_heads, tokens, head_dim), draw(batch, kv_heads, tokens, head_dim, seed=1)
    mu = draw(batch, kv_heads * group, head_dim, seed=2)
    root = draw(batch, kv_heads * group, head_dim, head_dim, seed=3)
    cov = root @ root.mT
    angle = draw(head_dim // 2, seed=4).repeat(2)
    cos, sin = 0.7 * angle.cos(), 0.7 * angle.sin()
    bounds = torch.tensor([[0, 9], [2, 8]])
    scores = reference.expected_attention(
        k=k,
        v=v if with_v else None,
        mu=mu,
        cov=cov,
        mean_cos=cos,
        mean_sin=sin,
        scale=scale,
        epsilon=epsilon,
        sink=sink,
        bounds=bounds,
    )
    turn = rotation_matrix(cos, sin)
    for b, (start, stop) in enumerate(bounds.tolist()):
        for g in range(kv_heads):
            expected = torch.full((tokens,), -math.inf, dtype=torch.float64)
            expected[start : start + sink] = math.inf
            expected[start + sink : stop] = 0.0
            for h in range(g * group, (g + 1) * group):
                mean, spread = turn @ mu[b, h], turn @ cov[b, h] @ turn.T
                keys = k[b, g, start + sink : stop]
                weights = softmax([float(scale * key @ mean + scale**2 * key @ spread @ key / 2) for key in keys])
                expected[start + sink : stop] += torch.tensor(weights, dtype=torch.float64) / group
            if with_v:
                for i in range(start + sink, stop):
                    expected[i] = (expected[i] + epsilon) * v[b, g, i].norm()
            torch.testing.assert_close(scores[b, g], expected, **TOLERANCE)


def test_it_is_the_mean_of_exponentials_under_the_model() -> None:
    """What the closed form stands for: the average of exp(scale q.k) over many queries drawn from the normal model."""
    torch.manual_seed(0)
    k, mu, root = torch.randn(1, 1, 6, 4), torch.randn(1, 1, 4), 0.5 * torch.randn(4, 4)
    queries = mu[0] + torch.randn(400_000, 4) @ root.T
    sampled = (0.5 * queries @ k[0, 0].T).exp().mean(0)
    scores = ops.expected_attention(k, None, mu, (root @ root.T)[None, None], scale=0.5, sink=0)
    torch.testing.assert_close(scores[0, 0], sampled / sampled.sum(), atol=3e-3, rtol=2e-2)


def good() -> dict[str, Any]:
    cache, square = torch.randn(2, 2, 10, 8), torch.randn(2, 4, 8, 8)
    rotation = {"mean_cos": torch.randn(8), "mean_sin": torch.randn(8)}
    return {"k": cache, "v": cache.clone(), "mu": torch.randn(2, 4, 8), "cov": square, **rotation}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param({"k": torch.ones(2, 10, 8)}, ValueError, "k has shape", id="rank of k"),
        pytest.param(
            {"v": torch.ones(2, 2, 9, 8)},
            ValueError,
            r"v has shape \[2, 2, 9, 8\], expected \[2, 2, 10, 8\], as k has",
            id="shape of v",
        ),
        pytest.param(
            {"v": torch.ones(2, 2, 10, 8).half()},
            TypeError,
            "v has dtype torch.float16, expected torch.float32",
            id="dtype of v",
        ),
        pytest.param(
            {"mu": torch.ones(2, 4, 8).half()},
            TypeError,
            "mu has dtype torch.float16, expected one of float32",
            id="dtype of mu",
        ),
        pytest.param({"mu": torch.ones(2, 8)}, ValueError, r"mu has shape \[2, 8\]", id="rank of mu"),
        pytest.param(
            {"mu": torch.ones(2, 3, 8)}, ValueError, "mu has 3 heads .* expected a multiple of k's 2", id="heads of mu"
        ),
        pytest.param(
            {"cov": torch.ones(2, 4, 8)},
            ValueError,
            r"cov has shape \[2, 4, 8\], expected \[B, H, D, D\] = \[2, 4, 8, 8\]",
            id="rank of cov",
        ),
        pytest.param({"cov": 3}, TypeError, "cov is a int", id="cov of int"),
        pytest.param({"mean_sin": None}, ValueError, "mean_sin is None", id="mean_cos alone"),
        pytest.param(
            {"mean_cos": torch.ones(1, 8)},
            ValueError,
            r"mean_cos has shape \[1, 8\], expected \[D\] = \[8\]",
            id="rank of mean_cos",
        ),
        pytest.param({"scale": math.nan}, ValueError, "scale is nan", id="scale of NaN"),
        pytest.param({"epsilon": -1e-3}, ValueError, "epsilon is -0.001", id="negative epsilon"),
        pytest.param({"epsilon": "0"}, TypeError, "epsilon is '0'", id="epsilon of text"),
        pytest.param({"epsilon": True}, TypeError, "epsilon is True", id="epsilon of bool"),
        pytest.param({"sink": True}, TypeError, "sink is True", id="sink of bool"),
        pytest.param({"bounds": [[0, 1]]}, TypeError, "bounds is a list", id="bounds of list"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.expected_attention(**{**good(), **change})


def test_it_passes_opcheck() -> None:
    given = good()
    tensors = [given[name] for name in ("k", "v", "mu", "cov", "mean_cos", "mean_sin")]
    torch.library.opcheck(torch.ops.condense_core.expected_attention.default, (*tensors, 0.3, 0.0, 4, None))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_it_is_traced_without_a_break_behind_query_moments(dynamic: bool) -> None:
    def scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return 2 * ops.expected_attention(k, v, *ops.query_moments(q, sink=2), sink=2)

    q, k, v = torch.randn(1, 4, 10, 8), torch.randn(1, 2, 10, 8), torch.randn(1, 2, 10, 8)
    compiled = torch.compile(scores, fullgraph=True, backend="eager", dynamic=dynamic)
    torch.testing.assert_close(compiled(q, k, v), scores(q, k, v))
