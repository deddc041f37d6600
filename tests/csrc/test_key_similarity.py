"""The CPU kernel of key_similarity against the specification."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from condense_core.ops import reference
from condense_core.ops.arguments import KeySimilarityArgs
from condense_core.ops.cpu.key_similarity import key_similarity

# A cosine of fp32 vectors of at most 256 channels, and a mean of up to 1,100 directions summed in another order:
# some units of 6e-8 each, relative to lengths of 1 and not to the cosine, which may be near 0. A mean whose directions
# cancel is known as much worse as it is shorter; random ones leave 1/sqrt(N) of their length, so keys share a part.
TOLERANCES = {"rtol": 0.0, "atol": 2e-6}


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Keys that share a direction, as those of a head do."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape[-1], generator=generator) + torch.randn(*shape, generator=generator)).to(dtype)


def check(**arguments: object) -> Tensor:
    args = KeySimilarityArgs(**arguments)
    expected = reference.key_similarity(*args)
    torch.testing.assert_close(key_similarity(args), expected, equal_nan=True, **TOLERANCES)
    return expected


# [B, G, N, D]
SHAPES = {
    "whole vectors": (1, 2, 300, 128),
    "head_dim with a rest": (2, 3, 33, 80),
    "head_dim below a vector": (3, 2, 70, 5),
    "one number": (1, 1, 1, 1),
    "three blocks, one head for all threads": (1, 1, 1100, 17),
    "no tokens": (1, 4, 0, 64),
}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(k=drawn(*shape, dtype=dtype), sink=0, window=0, bounds=None)


# The real tokens of two sequences of 40; the first token of each is padding, and NaN.
BOUNDS = {
    "padding before": [[5, 40], [1, 40]],
    "padding behind, and a sequence without tokens": [[1, 33], [7, 7]],
    "beyond the tensor, and falling": [[3, 100], [41, 50]],
}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
def test_padding_forced_tokens_and_strides(bounds: list[list[int]], index: torch.dtype, dtype: torch.dtype) -> None:
    k = drawn(2, 40, 3, 48, dtype=dtype).transpose(1, 2)
    k[:, :, 0] = float("nan")  # not to be read
    for sink, window in ((0, 0), (3, 0), (2, 50), (2**63 - 1, 1)):
        check(k=k[..., ::2], sink=sink, window=window, bounds=torch.tensor(bounds, dtype=index))


@pytest.mark.usefixtures("isa")
def test_short_keys_are_clamped_and_nan_spreads_over_its_head() -> None:
    k = drawn(1, 3, 9, 24)
    k[0, 0, 3], k[0, 0, 4] = 0.0, 1e-10 * k[0, 0, 4]
    k[0, 1] *= 1e-13
    k[0, 2, 5, 7] = float("nan")
    expected = check(k=k, sink=1, window=0, bounds=None)
    assert expected[0, 2, 1:].isnan().all()
    assert 0 < expected[0, 0, 4].abs() < 0.2  # below the clamp of 1e-8: no cosine any more
    assert expected[0, 1, 1:].abs().max() < 1e-4


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("shape", [(1, 1, 1300, 64), (1, 3, 700, 64)], ids=["shared heads", "a head a thread"])
def test_threads_do_not_change_a_bit(shape: tuple[int, ...], threads_agree: Callable[..., None]) -> None:
    args = KeySimilarityArgs(k=drawn(*shape), sink=0, window=0, bounds=None)
    threads_agree(lambda: [key_similarity(args)], 1, 2, 5)
