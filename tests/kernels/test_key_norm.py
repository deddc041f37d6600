"""The key_norm kernel against the specification."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from condense_core import ops
from condense_core.kernels import key_norm as kernel
from condense_core.ops import reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Both square and add in fp32 what is the same input, so the dtype does not matter: another order of at most 256 terms
# of one sign, then a correctly rounded root.
TOLERANCES = {"rtol": 3e-6, "atol": 0.0}


def keys(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Keys of very different norm from token to token."""
    k = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (k * torch.linspace(0.1, 6.0, max(shape[2], 1))[: shape[2], None]).to(DEVICE, dtype)


# One tile of 32 tokens and more, head_dim of a power of two or not, a row longer than usual, nothing, one token.
SHAPES = [(1, 2, 40, 128), (2, 3, 33, 80), (1, 1, 1, 1), (2, 1, 7, 96), (1, 4, 0, 64), (3, 2, 70, 5), (1, 1, 17, 256)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    k = keys(*shape, dtype=dtype)
    torch.testing.assert_close(kernel.forward(k, 0, 0, None), reference.key_norm(k), **TOLERANCES)


BOUNDS = {
    "left": [[5, 40], [0, 40]],
    "right": [[0, 33], [0, 1]],
    "empty": [[7, 7], [30, 9]],
    "beyond": [[-4, 100], [41, 50]],
}


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
def test_padding_scores_minus_inf_and_forced_tokens_inf(bounds: list[list[int]], index: torch.dtype) -> None:
    k = keys(2, 2, 40, 16)
    on_device = torch.tensor(bounds, dtype=index, device=DEVICE)
    for sink, window in [(0, 0), (3, 0), (0, 4), (2, 50), (10**12, 0)]:
        actual = kernel.forward(k, sink, window, on_device)
        torch.testing.assert_close(actual, reference.key_norm(k, sink, window, on_device), **TOLERANCES)


def test_strides_do_not_matter() -> None:
    k = keys(2, 3, 21, 24)
    expected = kernel.forward(k, 1, 2, None)
    transposed = k.transpose(1, 2).contiguous().transpose(1, 2)  # [B, N, G, D] in memory, as a projection leaves it
    sliced = torch.cat([k, k], 3)[..., 24:]
    part = torch.cat([k, k], 2)[:, :, 21:]
    dim_last = k.transpose(2, 3).contiguous().transpose(2, 3)  # the head dimension is not contiguous
    for view in (transposed, sliced, part, dim_last):
        assert torch.equal(kernel.forward(view, 1, 2, None), expected)
    bounds = torch.tensor([[1, 5], [20, 21]], device=DEVICE)
    assert torch.equal(kernel.forward(k, 0, 0, bounds.t().contiguous().t()), kernel.forward(k, 0, 0, bounds))


def test_nan_and_inf_stay_where_they_are() -> None:
    k = keys(1, 2, 40, 16)
    k[0, 1, 3, 5], k[0, 0, 8, 0], k[0, 0, 39, 2], k[0, 0, 0, 0] = float("nan"), float("inf"), float("nan"), float("nan")
    bounds = torch.tensor([[0, 39]], device=DEVICE)
    scores = kernel.forward(k, 1, 0, bounds)
    torch.testing.assert_close(scores, reference.key_norm(k, 1, 0, bounds), equal_nan=True, **TOLERANCES)
    assert scores.isnan().nonzero().tolist() == [[0, 1, 3]]
    assert scores[0, 0, 8] == float("-inf")
    assert scores[0, 0, 0] == float("inf")


@settings(max_examples=15, deadline=None)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 70), st.integers(1, 40)),
    st.integers(-3, 75),
    st.integers(-3, 75),
    st.integers(0, 80),
    st.integers(0, 80),
)
def test_any_shape_and_bounds(shape: tuple[int, ...], start: int, stop: int, sink: int, window: int) -> None:
    k = keys(*shape)
    bounds = torch.tensor([[start, stop]] * shape[0], device=DEVICE)
    expected = reference.key_norm(k, sink, window, bounds)
    torch.testing.assert_close(kernel.forward(k, sink, window, bounds), expected, **TOLERANCES)


@pytest.mark.usefixtures("triton_backend")
def test_the_public_op_runs_it() -> None:
    k = keys(2, 2, 35, 20)
    bounds = torch.tensor([[0, 30], [4, 35]], device=DEVICE)
    actual = ops.key_norm(k, sink=2, window=3, bounds=bounds)
    assert torch.equal(actual, kernel.forward(k, 2, 3, bounds))


def test_a_row_too_long_for_a_tile_is_declined() -> None:
    assert kernel.unsupported(torch.empty(1, 1, 1, 4096), 0, 0, None) is None
    assert "4097" in str(kernel.unsupported(torch.empty(1, 1, 1, 4097), 0, 0, None))
