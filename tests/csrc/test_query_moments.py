"""The CPU kernel of query_moments against the specification."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from condense_core.ops import reference
from condense_core.ops.arguments import QueryMomentsArgs
from condense_core.ops.cpu.query_moments import query_moments

# Of the mean and of the largest covariance: sums in fp32. Operands of 16-bit queries keep 2^-16 of themselves where
# the kernel multiplies them in two bf16 parts, csrc/cpu/split.h.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2**-15, torch.float16: 2**-15}


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


def tables(num_tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [N, D] of a rotation, with a factor as YaRN's."""
    angles = torch.rand(num_tokens, head_dim // 2, generator=torch.Generator().manual_seed(3)) * 6
    both = torch.cat([angles, angles], 1)
    return 1.2 * both.cos(), 1.2 * both.sin()


def check(args: QueryMomentsArgs) -> None:
    (mu, cov), (mean, covariance) = query_moments(args), reference.query_moments(*exact(args))
    torch.testing.assert_close(mu.double(), mean, rtol=2e-5, atol=2e-5)
    atol = TOLERANCES[args.q.dtype] * float(covariance.max())
    torch.testing.assert_close(cov.double(), covariance, rtol=2e-5, atol=atol)


# RoPE turns pairs of channels.
CASES = {f"{name}, not rotated": (shape, False) for name, shape in SHAPES.items()} | {
    f"{name}, rotated": (shape, True) for name, shape in SHAPES.items() if shape.head_dim % 2 == 0
}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("shape", "rotated"), CASES.values(), ids=CASES)
def test_it_equals_the_reference(shape: Shape, rotated: bool, dtype: torch.dtype) -> None:
    heads = shape.kv_heads * shape.group
    # A mean that is large beside the deviations.
    q = drawn(shape.batch, heads, shape.num_tokens, shape.head_dim, dtype=dtype) + 3
    cos, sin = (t[None] for t in tables(shape.num_tokens, shape.head_dim)) if rotated else (None, None)
    for bounds in padding(shape).values():
        for sink in (0, 2, 10**12):
            check(QueryMomentsArgs(q=q, cos=cos, sin=sin, sink=sink, bounds=bounds))


@pytest.mark.usefixtures("isa")
def test_tables_of_each_sequence_and_strides(dtype: torch.dtype) -> None:
    q = drawn(2, 60, 3, 24, dtype=dtype).transpose(1, 2)
    both = [torch.stack([t[:60], t[40:]]) for t in tables(100, 24)]
    cos, sin = (torch.cat([t, t], -1)[..., :24] for t in both)  # rows with gaps
    check(QueryMomentsArgs(q=q, cos=cos, sin=sin, sink=1, bounds=torch.tensor([[4, 60], [0, 50]])))


@pytest.mark.usefixtures("isa")
def test_infinities_go_where_the_reference_has_them(dtype: torch.dtype) -> None:
    q = drawn(1, 2, 300, 8, dtype=dtype)
    q[0, 0, 0, 1], q[0, 1, 290, 7] = float("inf"), float("nan")
    args = QueryMomentsArgs(q=q, cos=None, sin=None, sink=0, bounds=None)
    wanted = reference.query_moments(q.float(), sink=0)
    for mine, theirs in zip(query_moments(args), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-5, equal_nan=True)


def test_threads_do_not_change_a_bit(dtype: torch.dtype, threads_agree: Callable[..., None]) -> None:
    args = QueryMomentsArgs(q=drawn(1, 3, 400, 64, dtype=dtype), cos=None, sin=None, sink=4, bounds=None)
    threads_agree(lambda: query_moments(args), 1, 2, 3)
