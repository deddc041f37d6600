"""The CPU kernel of key_norm against the specification."""

import pytest
import torch

from condense_core.ops import reference
from condense_core.ops.arguments import KeyNormArgs
from condense_core.ops.cpu.key_norm import key_norm

# Another order of at most 256 fp32 terms of one sign, and a correctly rounded root; the dtype only rounds the input.
TOLERANCES = {"rtol": 3e-6, "atol": 0.0}
# head_dim of whole vectors, of none, of a part; nothing, one token, several blocks.
SHAPES = [(1, 2, 300, 128), (2, 3, 33, 80), (1, 1, 1, 1), (2, 1, 7, 96), (1, 4, 0, 64), (3, 2, 70, 5), (1, 1, 17, 256)]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    k = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.testing.assert_close(key_norm(KeyNormArgs(k, 0, 0, None)), reference.key_norm(k), **TOLERANCES)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_padding_forced_tokens_and_strides(index: torch.dtype, dtype: torch.dtype) -> None:
    k = torch.randn(2, 40, 3, 48, generator=torch.Generator().manual_seed(1)).to(dtype).transpose(1, 2)
    for bounds in ([[5, 40], [0, 40]], [[0, 33], [7, 7]], [[-4, 100], [41, 50]]):
        for sink, window in [(0, 0), (3, 0), (2, 50), (10**12, 1)]:
            real = torch.tensor(bounds, dtype=index)
            expected = reference.key_norm(k[..., ::2], sink, window, real)
            actual = key_norm(KeyNormArgs(k[..., ::2], sink, window, real))
            torch.testing.assert_close(actual, expected, **TOLERANCES)
