"""The CPU kernel of non_causal_chunks against the specification."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from condense_core.ops import reference
from condense_core.ops.arguments import NonCausalChunksArgs
from condense_core.ops.cpu.non_causal_chunks import non_causal_chunks

# Of the scores: products of the inputs as they are, sums in fp32, so that the dtype matters little. A probability
# carries the error of its logit, which is of the size of a few units.
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


def check(args: NonCausalChunksArgs) -> None:
    expected = reference.non_causal_chunks(*exact(args))
    torch.testing.assert_close(non_causal_chunks(args).double(), expected, **TOLERANCES)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_equals_the_reference(shape: Shape, dtype: torch.dtype) -> None:
    q = drawn(shape.batch, shape.kv_heads * shape.group, shape.num_tokens, shape.head_dim, dtype=dtype)
    k = drawn(shape.batch, shape.kv_heads, shape.num_tokens, shape.head_dim, seed=1, dtype=dtype)
    for bounds in padding(shape).values():
        for chunk_size in (7, min(100, shape.num_tokens)):
            scale = shape.head_dim**-0.5
            check(NonCausalChunksArgs(q=q, k=k, chunk_size=chunk_size, scale=scale, bounds=bounds))


@pytest.mark.usefixtures("isa")
def test_strides_and_a_nan_that_stays_in_its_chunk(dtype: torch.dtype) -> None:
    q, k = drawn(1, 4, 40, 16, dtype=dtype), drawn(1, 40, 2, 16, seed=1, dtype=dtype).transpose(1, 2)
    args = NonCausalChunksArgs(q=q, k=k, chunk_size=10, scale=0.25, bounds=None)
    clean = non_causal_chunks(args)
    assert torch.equal(clean, non_causal_chunks(args._replace(k=k.contiguous())))
    bad = k.clone()
    bad[0, 1, 13, 2] = float("nan")
    scores = non_causal_chunks(args._replace(k=bad))
    assert torch.equal(scores.isnan().nonzero()[:, 2], torch.arange(10, 20))
    assert torch.equal(scores[~scores.isnan()], clean[~scores.isnan()])


def test_threads_do_not_change_a_bit(dtype: torch.dtype, threads_agree: Callable[..., None]) -> None:
    q, k = drawn(1, 6, 700, 64, dtype=dtype), drawn(1, 3, 700, 64, seed=1, dtype=dtype)
    args = NonCausalChunksArgs(q=q, k=k, chunk_size=100, scale=0.125, bounds=None)
    threads_agree(lambda: [non_causal_chunks(args)], 1, 2, 3)
