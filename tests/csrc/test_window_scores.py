"""The CPU kernel of window_scores against the specification."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from condense_core.ops import reference
from condense_core.ops.arguments import WindowScoresArgs
from condense_core.ops.cpu.window_scores import window_scores

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
    window: int
    num_tokens: int
    head_dim: int


SHAPES = {
    "two blocks of tokens, two sequences": Shape(batch=2, kv_heads=2, group=4, window=7, num_tokens=530, head_dim=80),
    "a block and a rest, five query heads": Shape(batch=1, kv_heads=1, group=5, window=64, num_tokens=300, head_dim=8),
    "less than a tile in every direction": Shape(batch=2, kv_heads=1, group=3, window=8, num_tokens=33, head_dim=20),
    "head_dim beyond a vector by one": Shape(batch=1, kv_heads=1, group=1, window=2, num_tokens=17, head_dim=129),
    "one token": Shape(batch=1, kv_heads=2, group=1, window=1, num_tokens=1, head_dim=4),
    "one channel": Shape(batch=1, kv_heads=1, group=1, window=5, num_tokens=5, head_dim=1),
}


def padding(shape: Shape) -> dict[str, Tensor | None]:
    """Bounds with nothing to leave out, with something, and beyond the tensor."""
    n = shape.num_tokens
    return {
        "none": None,
        "some": torch.tensor([[1, n], [0, n - 2]])[: shape.batch],
        "beyond": torch.tensor([[-3, 99999], [n, 0]], dtype=torch.int32)[: shape.batch],
    }


def check(args: WindowScoresArgs) -> None:
    expected = reference.window_scores(*exact(args))
    torch.testing.assert_close(window_scores(args).double(), expected, **TOLERANCES)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_equals_the_reference(shape: Shape, dtype: torch.dtype) -> None:
    q_win = drawn(shape.batch, shape.kv_heads * shape.group, shape.window, shape.head_dim, dtype=dtype)
    k = drawn(shape.batch, shape.kv_heads, shape.num_tokens, shape.head_dim, seed=1, dtype=dtype)
    short = torch.tensor([[1, shape.window], [0, shape.window]])[: shape.batch]  # all of it in the window
    for bounds in (*padding(shape).values(), short):
        check(WindowScoresArgs(q_win=q_win, k=k, scale=shape.head_dim**-0.5, kernel_size=5, bounds=bounds))
    check(WindowScoresArgs(q_win=q_win, k=k, scale=-0.3, kernel_size=1, bounds=None))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("bounds", [None, torch.tensor([[300, 8_900]])], ids=["whole", "padded"])
def test_a_cache_too_long_to_be_scored_at_once(bounds: Tensor | None, dtype: torch.dtype) -> None:
    q_win, k = drawn(1, 6, 70, 64, dtype=dtype), drawn(1, 2, 9_000, 64, seed=1, dtype=dtype)
    check(WindowScoresArgs(q_win=q_win, k=k, scale=0.125, kernel_size=5, bounds=bounds))


@pytest.mark.usefixtures("isa")
def test_strides_and_a_nan_that_stays_in_its_head(dtype: torch.dtype) -> None:
    k = drawn(2, 50, 3, 32, seed=1, dtype=dtype).transpose(1, 2)
    args = WindowScoresArgs(q_win=drawn(2, 6, 4, 32, dtype=dtype), k=k, scale=0.2, kernel_size=5, bounds=None)
    clean = window_scores(args)
    assert torch.equal(clean, window_scores(args._replace(k=k.contiguous())))
    bad = k.clone()
    bad[1, 2, 7, 3] = float("nan")
    scores = window_scores(args._replace(k=bad))
    assert torch.equal(scores.isnan(), reference.window_scores(*args._replace(k=bad)).isnan())
    assert torch.equal(scores[0], clean[0])
    behind = torch.tensor([[0, 50], [8, 50]])  # the same token, as padding
    assert not window_scores(args._replace(k=bad, bounds=behind)).isnan().any()


@pytest.mark.parametrize("num_tokens", [700, 9_000], ids=["at once", "in blocks"])
def test_threads_do_not_change_a_bit(num_tokens: int, dtype: torch.dtype, threads_agree: Callable[..., None]) -> None:
    q_win, k = drawn(1, 6, 70, 64, dtype=dtype), drawn(1, 3, num_tokens, 64, seed=1, dtype=dtype)
    args = WindowScoresArgs(q_win=q_win, k=k, scale=0.125, kernel_size=5, bounds=None)
    threads_agree(lambda: [window_scores(args)], *((1, 2, 3) if num_tokens < 1_000 else (2, 3)))
