"""The CPU kernel of expected_attention against the specification."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from condense_core.ops import reference
from condense_core.ops.arguments import ExpectedAttentionArgs
from condense_core.ops.cpu.expected_attention import expected_attention

# Of the scores: a probability carries the error of its logit, a quadratic form whose terms are some tens.
TOLERANCES = {"rtol": 2e-4, "atol": 1e-7}


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(args: NamedTuple) -> Any:
    """The same arguments in float64."""
    return args._replace(
        **{
            name: value.double()
            for name, value in args._asdict().items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
    )


class Shape(NamedTuple):
    batch: int
    kv_heads: int
    group: int  # query heads of a KV head
    num_tokens: int
    head_dim: int


SHAPES = {
    "two blocks of tokens, two sequences": Shape(batch=2, kv_heads=2, group=4, num_tokens=530, head_dim=80),
    "a block and a rest, five query heads": Shape(batch=1, kv_heads=1, group=5, num_tokens=300, head_dim=8),
    "less than a tile in every direction": Shape(batch=2, kv_heads=1, group=3, num_tokens=33, head_dim=20),
    "head_dim beyond a vector by one": Shape(batch=1, kv_heads=1, group=1, num_tokens=17, head_dim=129),
    "one token": Shape(batch=1, kv_heads=2, group=1, num_tokens=1, head_dim=4),
    "one channel": Shape(batch=1, kv_heads=1, group=1, num_tokens=5, head_dim=1),
}


def padding(shape: Shape) -> dict[str, Tensor | None]:
    """Bounds with nothing to leave out, with something, and beyond the tensor."""
    n = shape.num_tokens
    return {
        "none": None,
        "some": torch.tensor([[1, n], [0, n - 2]])[: shape.batch],
        "beyond": torch.tensor([[-3, 99999], [n, 0]], dtype=torch.int32)[: shape.batch],
    }


def moments(shape: Shape) -> tuple[Tensor, Tensor]:
    """Mean [B, H, D] and covariance [B, H, D, D] of random queries."""
    q = drawn(shape.batch, shape.kv_heads * shape.group, 50, shape.head_dim, seed=4)
    return reference.query_moments(q, sink=0)


def check(args: ExpectedAttentionArgs) -> None:
    expected = reference.expected_attention(*exact(args))
    torch.testing.assert_close(expected_attention(args).double(), expected, **TOLERANCES)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_equals_the_reference(shape: Shape, dtype: torch.dtype) -> None:
    size = (shape.batch, shape.kv_heads, shape.num_tokens, shape.head_dim)
    mu, cov = moments(shape)
    args = ExpectedAttentionArgs(
        k=drawn(*size, seed=1, dtype=dtype),
        v=drawn(*size, seed=2, dtype=dtype),
        mu=mu,
        cov=cov,
        mean_cos=None,
        mean_sin=None,
        scale=shape.head_dim**-0.5,
        epsilon=0.0,
        sink=2,
        bounds=None,
    )
    for bounds in padding(shape).values():
        check(args._replace(bounds=bounds))
        check(args._replace(bounds=bounds, v=None, cov=None))
    check(args._replace(epsilon=0.01, sink=0))
    check(args._replace(sink=10**12, bounds=torch.tensor([[1, shape.num_tokens]]).expand(shape.batch, 2)))
    if shape.head_dim % 2 == 0:
        angles = torch.rand(shape.head_dim, generator=torch.Generator().manual_seed(3))
        check(args._replace(mean_cos=angles.cos(), mean_sin=angles.sin()))
        check(args._replace(mean_cos=angles.cos(), mean_sin=angles.sin(), cov=None, v=None))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("changed", ["k", "cov"])
def test_infinities_go_where_the_reference_has_them(changed: str, dtype: torch.dtype) -> None:
    k, mu, cov = drawn(1, 1, 300, 8, dtype=dtype), drawn(1, 2, 8, seed=1), torch.eye(8).expand(1, 2, 8, 8).clone()
    place = k[0, 0, 200] if changed == "k" else cov[0, 1, 2]
    place[3] = float("-inf")
    none = {"v": None, "mean_cos": None, "mean_sin": None, "bounds": None}
    args = ExpectedAttentionArgs(k=k, mu=mu, cov=cov, scale=0.5, epsilon=0.0, sink=4, **none)
    expected = reference.expected_attention(*args._replace(k=k.float()))
    assert torch.equal(expected_attention(args).isnan(), expected.isnan())


def test_threads_do_not_change_a_bit(dtype: torch.dtype, threads_agree: Callable[..., None]) -> None:
    shape = Shape(batch=1, kv_heads=2, group=2, num_tokens=500, head_dim=32)
    mu, cov = moments(shape)
    k, v = (drawn(1, 2, 500, 32, seed=seed, dtype=dtype) for seed in (1, 2))
    none = {"mean_cos": None, "mean_sin": None, "bounds": None}
    args = ExpectedAttentionArgs(k=k, v=v, mu=mu, cov=cov, scale=0.2, epsilon=0.01, sink=4, **none)
    threads_agree(lambda: [expected_attention(args)], 1, 2, 3)
