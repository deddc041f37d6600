"""The CPU kernel of key_norm against the specification."""

import pytest
import torch
from torch import Tensor

from condense_core.ops import reference
from condense_core.ops.arguments import KeyNormArgs
from condense_core.ops.cpu.key_norm import key_norm

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# Another order of at most 256 fp32 terms of one sign, and a correctly rounded root; the dtype only rounds the input.
TOLERANCES = {"rtol": 3e-6, "atol": 0.0}


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(**arguments: object) -> None:
    args = KeyNormArgs(**arguments)
    torch.testing.assert_close(key_norm(args), reference.key_norm(*args), **TOLERANCES)


# [B, G, N, D]
SHAPES = {
    "whole vectors, two blocks of tokens": (1, 2, 300, 128),
    "head_dim with a rest": (2, 3, 33, 80),
    "head_dim below a vector": (3, 2, 70, 5),
    "one number": (1, 1, 1, 1),
    "the widest heads": (1, 1, 17, 256),
    "no tokens": (1, 4, 0, 64),
}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(k=drawn(*shape, dtype=dtype), sink=0, window=0, bounds=None)


# The real tokens of two sequences of 40.
BOUNDS = {
    "padding before": [[5, 40], [0, 40]],
    "padding behind, and a sequence without tokens": [[0, 33], [7, 7]],
    "beyond the tensor, and falling": [[-4, 100], [41, 50]],
}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
def test_padding_forced_tokens_and_strides(bounds: list[list[int]], index: torch.dtype, dtype: torch.dtype) -> None:
    k = drawn(2, 40, 3, 48, dtype=dtype).transpose(1, 2)[..., ::2]
    for sink, window in ((0, 0), (3, 0), (2, 50), (2**63 - 1, 1)):
        check(k=k, sink=sink, window=window, bounds=torch.tensor(bounds, dtype=index))


@pytest.mark.usefixtures("isa")
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    batch, heads, num_tokens, head_dim = (data.draw(st.integers(low, high)) for low, high in SIZES)
    ends = st.integers(-2, num_tokens + 2)
    check(
        k=drawn(batch, heads, num_tokens, head_dim, seed=data.draw(st.integers(0, 9))),
        sink=data.draw(st.integers(0, 5)),
        window=data.draw(st.integers(0, 5)),
        bounds=torch.tensor([[data.draw(ends), data.draw(ends)] for _ in range(batch)]),
    )


SIZES = ((1, 3), (1, 3), (0, 70), (1, 70))
