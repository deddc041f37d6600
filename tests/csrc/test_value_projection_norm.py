"""The CPU kernel of value_projection_norm against the specification."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from condense_core.ops import reference
from condense_core.ops.arguments import ValueProjectionNormArgs
from condense_core.ops.cpu.value_projection_norm import value_projection_norm

# Of the scores, sums of magnitudes: products of the inputs as they are, sums in fp32.
TOLERANCES = {"rtol": 2e-5, "atol": 1e-7}


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


def check(args: ValueProjectionNormArgs) -> None:
    expected = reference.value_projection_norm(*exact(args))
    torch.testing.assert_close(value_projection_norm(args).double(), expected, **TOLERANCES)


# d_model: below a block of 128 columns, and two blocks with a rest.
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("d_model", [40, 280])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_equals_the_reference(shape: Shape, d_model: int, dtype: torch.dtype) -> None:
    v = drawn(shape.batch, shape.kv_heads, shape.num_tokens, shape.head_dim, dtype=dtype)
    w_o = drawn(d_model, shape.kv_heads * shape.group * shape.head_dim, seed=1, dtype=dtype)
    for bounds in padding(shape).values():
        check(ValueProjectionNormArgs(v=v, w_o=w_o, bounds=bounds))


@pytest.mark.usefixtures("isa")
def test_more_tokens_than_a_task_takes() -> None:
    check(ValueProjectionNormArgs(v=drawn(1, 1, 2_060, 16), w_o=drawn(33, 16, seed=1), bounds=None))


@pytest.mark.usefixtures("isa")
def test_strides_nan_and_infinity_stay_with_their_token(dtype: torch.dtype) -> None:
    v, w_o = drawn(2, 50, 3, 32, dtype=dtype).transpose(1, 2), drawn(70, 6 * 32, seed=1, dtype=dtype)
    args = ValueProjectionNormArgs(v=v, w_o=w_o, bounds=None)
    clean = value_projection_norm(args)
    assert torch.equal(clean, value_projection_norm(args._replace(v=v.contiguous())))
    bad = v.clone()
    bad[1, 2, 7, 3], bad[0, 0, 2, 3] = float("nan"), float("inf")
    scores = value_projection_norm(args._replace(v=bad))
    assert scores.isnan().nonzero().tolist() == [[1, 2, 7]]
    assert scores.isinf().nonzero().tolist() == [[0, 0, 2]]


def test_threads_do_not_change_a_bit(dtype: torch.dtype, threads_agree: Callable[..., None]) -> None:
    v, w_o = drawn(1, 3, 700, 64, dtype=dtype), drawn(200, 6 * 64, seed=1, dtype=dtype)
    args = ValueProjectionNormArgs(v=v, w_o=w_o, bounds=None)
    threads_agree(lambda: [value_projection_norm(args)], 1, 2, 3)
