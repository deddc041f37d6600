"""The value_projection_norm kernels against the specification."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from condense_core import ops
from condense_core.kernels import value_projection_norm as kernel
from condense_core.kernels.launch import TARGETS, record
from condense_core.ops import reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Products of 16-bit inputs are exact in fp32, and both add in fp32: another order of head_dim terms, and then of
# d_model terms of one sign. One projection is off by some units of 1.2e-7 of its largest terms; their sum by less,
# relatively.
TOLERANCES = {"rtol": 1e-5, "atol": 0.0}


def inputs(
    batch: int, heads: int, group: int, tokens: int, head_dim: int, d_model: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Values of very different size from token to token, and a projection whose heads differ in size."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(batch, heads, tokens, head_dim, generator=generator)
    v *= torch.linspace(0.1, 6.0, max(tokens, 1))[:tokens, None]
    w_o = torch.randn(d_model, heads * group * head_dim, generator=generator) / head_dim**0.5
    w_o *= torch.linspace(0.5, 2.0, heads * group).repeat_interleave(head_dim)
    return v.to(DEVICE, dtype), w_o.to(DEVICE, dtype)


def parts_and_block(v: Tensor, w_o: Tensor) -> tuple[int, int]:
    """Parts of the walk, and tokens of a tile."""
    with record(TARGETS[90]) as launches:
        kernel.forward(v.to("meta"), w_o.to("meta"), None)
    return launches[0].args[8], launches[0].constexprs["BLOCK_N"]


# (batch, heads, group, tokens, head_dim, d_model): d_model of whole tiles of 64 rows and not, and smaller than one;
# grouped heads, one head, one query head each; head_dim of a power of two or not, below 16, wider than one tile; one
# token, none.
SHAPES = [
    (1, 2, 2, 40, 32, 128),
    (2, 2, 3, 33, 20, 100),
    (1, 1, 4, 17, 8, 33),
    (1, 4, 1, 5, 80, 64),
    (1, 2, 2, 1, 16, 8),
    (1, 1, 1, 0, 16, 8),
    (1, 1, 2, 20, 257, 70),
    (1, 1, 2, 300, 16, 70),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    v, w_o = inputs(*shape, dtype=dtype)
    actual = kernel.forward(v, w_o, None)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, reference.value_projection_norm(v, w_o), **TOLERANCES)


def test_walks_in_one_part_and_in_several() -> None:
    one, several = inputs(4, 17, 1, 40, 8, 64, torch.float16), inputs(1, 1, 3, 40, 16, 130, torch.float16)
    assert parts_and_block(*one)[0] == 1
    assert parts_and_block(*several)[0] > 1
    for v, w_o in (one, several):
        # The parts of the interpreter's small device are others again.
        torch.testing.assert_close(kernel.forward(v, w_o, None), reference.value_projection_norm(v, w_o), **TOLERANCES)


def test_parts_fill_the_device() -> None:
    assert kernel._parts(64, 264, 256) == 4  # one round of 256 programs
    assert kernel._parts(1024, 264, 256) == 1
    assert kernel._parts(1, 264, 3) == 3
    assert kernel._parts(0, 264, 256) >= 1
    for programs, slots, steps in [(128, 216, 256), (7, 132, 48), (300, 264, 100)]:
        parts = kernel._parts(programs, slots, steps)
        rounds = -(-programs * parts // slots) * -(-steps // parts)
        assert rounds <= -(-programs // slots) * steps


@pytest.mark.parametrize("bounds", [[[3, 40], [0, 40]], [[0, 33], [0, 1]], [[7, 7], [30, 9]], [[-4, 99], [40, 50]]])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_padding_scores_minus_inf_and_is_not_read(bounds: list[list[int]], index: torch.dtype) -> None:
    v, w_o = inputs(2, 2, 2, 40, 16, 70)
    on_device = torch.tensor(bounds, dtype=index, device=DEVICE)
    expected = reference.value_projection_norm(v, w_o, on_device)
    for b, (start, stop) in enumerate(bounds):
        v[b, :, : max(start, 0)] = float("nan")
        v[b, :, max(start, stop, 0) :] = float("nan")
    torch.testing.assert_close(kernel.forward(v, w_o, on_device), expected, **TOLERANCES)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_stays_with_its_token_or_head() -> None:
    v, w_o = inputs(1, 2, 2, 20, 16, 70)
    expected = kernel.forward(v, w_o, None)
    v[0, 1, 3, 5] = float("nan")
    scores = kernel.forward(v, w_o, None)
    assert scores.isnan().nonzero().tolist() == [[0, 1, 3]]
    assert torch.equal(scores[~scores.isnan()], expected[~scores.isnan()])
    w_o[69, 5] = float("nan")  # head 0
    scores = kernel.forward(v, w_o, None)
    assert scores[0, 0].isnan().all()
    assert scores[0, 1].isnan().sum() == 1


def test_strides_do_not_matter() -> None:
    v, w_o = inputs(2, 2, 2, 20, 24, 70)
    expected = kernel.forward(v, w_o, None)
    transposed = v.transpose(1, 2).contiguous().transpose(1, 2)
    sliced = torch.cat([v, v], 3)[..., 24:]
    dim_last = v.transpose(2, 3).contiguous().transpose(2, 3)
    wide, turned = torch.cat([w_o, w_o], 1)[:, w_o.shape[1] :], w_o.t().contiguous().t()
    for view, weight in [(transposed, wide), (sliced, turned), (dim_last, w_o)]:
        assert torch.equal(kernel.forward(view, weight, None), expected)


def test_the_same_bits_every_time() -> None:
    v, w_o = inputs(1, 2, 2, 40, 32, 200, torch.float16)
    assert torch.equal(kernel.forward(v, w_o, None), kernel.forward(v, w_o, None))


@settings(max_examples=12, deadline=None)
@given(
    st.tuples(*(st.integers(1, high) for high in (2, 3, 3, 40, 40, 150))),
    st.sampled_from([torch.float32, torch.float16]),
    st.integers(-3, 45),
    st.integers(-3, 45),
)
def test_any_shape_and_bounds(shape: tuple[int, ...], dtype: torch.dtype, start: int, stop: int) -> None:
    v, w_o = inputs(*shape, dtype=dtype)
    bounds = torch.tensor([[start, stop]] * shape[0], device=DEVICE)
    expected = reference.value_projection_norm(v, w_o, bounds)
    torch.testing.assert_close(kernel.forward(v, w_o, bounds), expected, **TOLERANCES)


@pytest.mark.usefixtures("triton_backend")
def test_the_public_op_runs_it() -> None:
    v, w_o = inputs(1, 2, 2, 20, 16, 70)
    bounds = torch.tensor([[1, 18]], device=DEVICE)
    assert torch.equal(ops.value_projection_norm(v, w_o, bounds=bounds), kernel.forward(v, w_o, bounds))
