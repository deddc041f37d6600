"""The key_similarity kernels against the specification."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from condense_core import ops
from condense_core.kernels import key_similarity as kernel
from condense_core.kernels.launch import TARGETS, record
from condense_core.ops import reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Cosines, of order 1. Both compute in fp32 from the same input, so the dtype does not matter: another order of
# summation over at most some hundred tokens and 256 channels, a few units of 1.2e-7 each.
TOLERANCES = {"rtol": 0.0, "atol": 2e-6}


def keys(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Keys around a common direction, as real ones are, of very different norm from token to token."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(*shape, generator=generator) + torch.randn(shape[1], 1, shape[3], generator=generator)
    return (k * torch.linspace(0.1, 6.0, max(shape[2], 1))[: shape[2], None]).to(DEVICE, dtype)


# One run of tokens and several, of one tile and several; head_dim of a power of two or not; nothing; one token.
SHAPES = [(1, 2, 40, 128), (2, 3, 33, 80), (1, 1, 1, 1), (1, 4, 0, 64), (1, 1, 300, 96), (3, 2, 70, 5), (1, 1, 65, 256)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    k = keys(*shape, dtype=dtype)
    torch.testing.assert_close(kernel.forward(k, 0, 0, None), reference.key_similarity(k), **TOLERANCES)


def test_several_tiles_to_a_run_and_several_runs_to_a_head() -> None:
    k = keys(2, 1, 700, 128)
    with record(TARGETS[90]) as launches:
        kernel.forward(k.to("meta"), 0, 0, None)
    splits, run = launches[0].args[5:7]
    assert splits > 1
    assert run > 32
    bounds = torch.tensor([[129, 650], [0, 700]], device=DEVICE)
    expected = reference.key_similarity(k, 4, 16, bounds)
    torch.testing.assert_close(kernel.forward(k, 4, 16, bounds), expected, **TOLERANCES)


BOUNDS = {
    "left": [[5, 100], [0, 100]],
    "right": [[0, 33], [0, 1]],
    "empty": [[7, 7], [30, 9]],
    "beyond": [[-4, 200], [101, 150]],
}


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
def test_padding_neither_counts_nor_scores(bounds: list[list[int]], index: torch.dtype) -> None:
    k = keys(2, 2, 100, 16)
    on_device = torch.tensor(bounds, dtype=index, device=DEVICE)
    for sink, window in [(0, 0), (3, 4), (2, 500)]:
        expected = reference.key_similarity(k, sink, window, on_device)
        actual = kernel.forward(k, sink, window, on_device)
        torch.testing.assert_close(actual, expected, **TOLERANCES)
        for b, (start, stop) in enumerate(bounds):
            spoilt = k.clone()
            spoilt[b, :, : max(start, 0)] = float("nan")
            spoilt[b, :, max(stop, start, 0) :] = float("nan")
            assert torch.equal(kernel.forward(spoilt, sink, window, on_device), actual)


def test_norms_are_clamped_as_torch_clamps_them() -> None:
    k = keys(1, 1, 40, 16)
    k[0, 0, 3] = 0.0
    k[0, 0, 4] *= 1e-10  # counts in full in the mean, and is clamped in the cosine
    k[0, 0, 5] *= 1e-14  # is clamped in both
    scores = kernel.forward(k, 0, 0, None)
    torch.testing.assert_close(scores, reference.key_similarity(k), **TOLERANCES)
    assert scores[0, 0, 3] == 0.0
    zeros = torch.zeros(1, 1, 5, 8, device=DEVICE)
    assert torch.equal(kernel.forward(zeros, 0, 0, None), torch.zeros(1, 1, 5, device=DEVICE))


def test_strides_do_not_matter() -> None:
    k = keys(2, 3, 81, 24)
    expected = kernel.forward(k, 1, 2, None)
    transposed = k.transpose(1, 2).contiguous().transpose(1, 2)
    sliced = torch.cat([k, k], 3)[..., 24:]
    dim_last = k.transpose(2, 3).contiguous().transpose(2, 3)
    for view in (transposed, sliced, dim_last):
        assert torch.equal(kernel.forward(view, 1, 2, None), expected)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_reaches_the_scores_of_its_head_only() -> None:
    k = keys(2, 2, 40, 16)
    expected = kernel.forward(k, 2, 0, None)
    k[0, 1, 30, 5] = float("nan")
    k[1, 0, 20, 1] = float("inf")
    scores = kernel.forward(k, 2, 0, None)
    spoilt = torch.tensor([[False, True], [True, False]], device=DEVICE)
    assert scores[spoilt][:, 2:].isnan().all()
    assert (scores[spoilt][:, :2] == float("inf")).all()
    assert torch.equal(scores[~spoilt], expected[~spoilt])
    torch.testing.assert_close(scores, reference.key_similarity(k, 2), equal_nan=True, **TOLERANCES)


def test_the_same_bits_every_time() -> None:
    k = keys(2, 2, 300, 64)
    assert torch.equal(kernel.forward(k, 0, 0, None), kernel.forward(k, 0, 0, None))


@settings(max_examples=15, deadline=None)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 90), st.integers(1, 70)),
    st.integers(-3, 95),
    st.integers(-3, 95),
    st.integers(0, 99),
)
def test_any_shape_and_bounds(shape: tuple[int, ...], start: int, stop: int, sink: int) -> None:
    k = keys(*shape)
    bounds = torch.tensor([[start, stop]] * shape[0], device=DEVICE)
    expected = reference.key_similarity(k, sink, 0, bounds)
    torch.testing.assert_close(kernel.forward(k, sink, 0, bounds), expected, **TOLERANCES)


@pytest.mark.usefixtures("triton_backend")
def test_the_public_op_runs_it() -> None:
    k = keys(2, 2, 35, 20)
    bounds = torch.tensor([[0, 30], [4, 35]], device=DEVICE)
    actual = ops.key_similarity(k, sink=2, window=3, bounds=bounds)
    assert torch.equal(actual, kernel.forward(k, 2, 3, bounds))


def test_a_row_too_long_for_a_tile_is_declined() -> None:
    assert kernel.unsupported(torch.empty(1, 1, 1, 4096), 0, 0, None) is None
    assert "4097" in str(kernel.unsupported(torch.empty(1, 1, 1, 4097), 0, 0, None))
