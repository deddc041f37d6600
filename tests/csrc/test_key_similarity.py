"""The CPU kernel of key_similarity against the specification."""

import pytest
import torch
from torch import Tensor

from condense_core.ops import reference
from condense_core.ops.arguments import KeySimilarityArgs
from condense_core.ops.cpu.key_similarity import key_similarity

# A cosine of fp32 vectors of at most 256 channels, and a mean of up to 1,100 directions summed in another order:
# some units of 6e-8 each, relative to lengths of 1 and not to the cosine, which may be near 0. A mean whose directions
# cancel is known as much worse as it is shorter; random ones leave 1/sqrt(N) of their length, hence the shift below.
TOLERANCES = {"rtol": 0.0, "atol": 2e-6}
# head_dim of whole vectors, of none, of a part; nothing, one token, several blocks, one head for all threads.
SHAPES = [(1, 2, 300, 128), (2, 3, 33, 80), (1, 1, 1, 1), (2, 1, 7, 96), (1, 4, 0, 64), (3, 2, 70, 5), (1, 1, 1100, 17)]


def keys(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Keys that share a direction, as those of a head do."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape[-1], generator=generator) + torch.randn(*shape, generator=generator)).to(dtype)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    k = keys(*shape, dtype=dtype)
    torch.testing.assert_close(
        key_similarity(KeySimilarityArgs(k, 0, 0, None)), reference.key_similarity(k), **TOLERANCES
    )


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_padding_forced_tokens_and_strides(index: torch.dtype, dtype: torch.dtype) -> None:
    k = keys(2, 40, 3, 48, dtype=dtype).transpose(1, 2)
    k[:, :, 0] = float("nan")  # padding in the first bounds: not to be read
    for bounds in ([[5, 40], [1, 40]], [[1, 33], [7, 7]], [[3, 100], [41, 50]]):
        assert key_similarity(KeySimilarityArgs(k[:, :, :0, ::2], 0, 0, None)).shape == (2, 3, 0)
        for sink, window in [(0, 0), (3, 0), (2, 50), (10**12, 1)]:
            real = torch.tensor(bounds, dtype=index)
            expected = reference.key_similarity(k[..., ::2], sink, window, real)
            actual = key_similarity(KeySimilarityArgs(k[..., ::2], sink, window, real))
            torch.testing.assert_close(actual, expected, **TOLERANCES)


@pytest.mark.usefixtures("isa")
def test_short_keys_are_clamped_and_nan_spreads_over_its_head() -> None:
    k = keys(1, 3, 9, 24)
    k[0, 0, 3], k[0, 0, 4] = 0.0, 1e-10 * k[0, 0, 4]
    k[0, 1] *= 1e-13
    k[0, 2, 5, 7] = float("nan")
    expected, actual = reference.key_similarity(k, 1), key_similarity(KeySimilarityArgs(k, 1, 0, None))
    torch.testing.assert_close(actual, expected, equal_nan=True, **TOLERANCES)
    assert expected[0, 2, 1:].isnan().all()
    assert 0 < expected[0, 0, 4].abs() < 0.2  # below the clamp of 1e-8: no cosine any more
    assert expected[0, 1, 1:].abs().max() < 1e-4


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("shape", [(1, 1, 1300, 64), (1, 3, 700, 64)], ids=str)
def test_threads_do_not_change_a_bit(shape: tuple[int, ...]) -> None:
    k, before = keys(*shape), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(key_similarity(KeySimilarityArgs(k, 0, 0, None)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
