"""value_projection_norm on Triton: kernels/value_projection_norm.py against the specification in ops/reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core import ops
from condense_core.kernels import value_projection_norm as kernel
from condense_core.kernels.launch import TARGETS, record
from condense_core.ops import reference
from condense_core.ops.arguments import ValueProjectionNormArgs

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN = float("nan")

# Products of 16-bit inputs are exact in fp32, and both add in fp32: another order of head_dim terms, and then of
# d_model terms of one sign. One projection is off by some units of 2^-23 of its largest terms; their sum by less,
# relatively.
TOLERANCES = {"rtol": 1e-5, "atol": 0.0}


def draw(
    *,
    batch: int = 1,
    num_kv_heads: int = 2,
    group: int = 2,
    num_tokens: int = 20,
    head_dim: int = 16,
    d_model: int = 70,
    dtype: torch.dtype = torch.float32,
    bounds: Tensor | None = None,
) -> ValueProjectionNormArgs:
    """Arguments of the op: values of very different size, and a projection whose heads differ in size."""
    generator = torch.Generator().manual_seed(0)
    num_heads = num_kv_heads * group
    v = torch.randn(batch, num_kv_heads, num_tokens, head_dim, generator=generator)
    v *= torch.linspace(0.1, 6.0, max(num_tokens, 1))[:num_tokens, None]
    w_o = torch.randn(d_model, num_heads * head_dim, generator=generator) / head_dim**0.5
    w_o *= torch.linspace(0.5, 2.0, num_heads).repeat_interleave(head_dim)
    return ValueProjectionNormArgs(v=v.to(DEVICE, dtype), w_o=w_o.to(DEVICE, dtype), bounds=bounds)


def check(args: ValueProjectionNormArgs) -> Tensor:
    """The kernels' scores, after they were found right."""
    scores = kernel.forward(args)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, reference.value_projection_norm(*args), equal_nan=True, **TOLERANCES)
    return scores


def parts_of(args: ValueProjectionNormArgs) -> int:
    """Parts of the walk over w_o on sm_90."""
    with record(TARGETS[90]) as launches:
        kernel.forward(args._replace(v=args.v.to("meta"), w_o=args.w_o.to("meta")))
    parts: int = dict(zip(launches[0].kernel.arg_names, launches[0].args, strict=False))["parts"]
    return parts


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"num_tokens": 40, "head_dim": 32, "d_model": 128}, id="whole-tiles-of-64-rows"),
        pytest.param(
            {"batch": 2, "group": 3, "num_tokens": 33, "head_dim": 20, "d_model": 100}, id="a-short-last-tile"
        ),
        pytest.param({"num_kv_heads": 1, "group": 4, "num_tokens": 17, "head_dim": 8, "d_model": 33}, id="head_dim-8"),
        pytest.param({"num_kv_heads": 4, "group": 1, "num_tokens": 5, "head_dim": 80, "d_model": 64}, id="mha"),
        pytest.param({"num_kv_heads": 1, "head_dim": 257}, id="channels-in-tiles"),
        pytest.param({"num_kv_heads": 1, "num_tokens": 300}, id="several-tiles-of-tokens"),
        pytest.param({"num_tokens": 1, "d_model": 8}, id="one-token"),
        pytest.param({"num_tokens": 0, "d_model": 8}, id="no-tokens"),
    ],
)
def test_shapes(shape: dict[str, int], dtype: torch.dtype) -> None:
    check(draw(**shape, dtype=dtype))


def test_walks_in_one_part_and_in_several() -> None:
    one = draw(batch=4, num_kv_heads=17, group=1, head_dim=8, d_model=64, dtype=torch.float16)
    several = draw(num_kv_heads=1, group=3, num_tokens=40, d_model=130, dtype=torch.float16)
    assert parts_of(one) == 1
    assert parts_of(several) > 1
    check(one)  # the parts of the interpreter's small device are others again
    check(several)


def test_parts_fill_the_device() -> None:
    assert kernel._parts(64, 264, 256) == 4, "one round of 256 programs"
    assert kernel._parts(1024, 264, 256) == 1
    assert kernel._parts(1, 264, 3) == 3
    assert kernel._parts(0, 264, 256) >= 1


@settings(deadline=None)
@given(programs=st.integers(1, 2000), slots=st.integers(1, 400), steps=st.integers(1, 300))
def test_parts_never_take_longer_than_one(programs: int, slots: int, steps: int) -> None:
    def time(parts: int) -> int:
        """Rounds of `slots` programs, each of its steps and two more to start."""
        return -(-programs * parts // slots) * (-(-steps // parts) + 2)

    assert time(kernel._parts(programs, slots, steps)) <= time(1)


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 2),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    num_tokens=st.integers(1, 40),
    head_dim=st.integers(1, 40),
    d_model=st.integers(1, 150),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    bounds=st.lists(st.tuples(st.integers(-3, 45), st.integers(-3, 45)), min_size=2, max_size=2),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_any_shape_and_padding(
    batch: int, bounds: list[tuple[int, int]], index_dtype: torch.dtype, **shape: Any
) -> None:
    on_device = torch.tensor(bounds[:batch], dtype=index_dtype, device=DEVICE)
    check(draw(batch=batch, bounds=on_device, **shape))


def test_padding_is_not_read() -> None:
    args = draw(batch=2, num_tokens=40, bounds=torch.tensor([[3, 40], [0, 33]], device=DEVICE))
    scores = check(args)
    args.v[0, :, :3] = args.v[1, :, 33:] = NAN
    assert torch.equal(kernel.forward(args), scores)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_stays_with_its_token_or_head() -> None:
    args = draw()
    clean = kernel.forward(args)
    args.v[0, 1, 3, 5] = NAN
    scores = kernel.forward(args)
    assert scores.isnan().nonzero().tolist() == [[0, 1, 3]]
    assert torch.equal(scores[~scores.isnan()], clean[~scores.isnan()])
    args.w_o[69, 5] = NAN  # head 0
    scores = kernel.forward(args)
    assert scores[0, 0].isnan().all()
    assert scores[0, 1].isnan().sum() == 1


def test_strides_do_not_matter() -> None:
    args = draw(batch=2, head_dim=24)
    expected, (v, w_o, _) = kernel.forward(args), args
    views = {
        "as a projection leaves it, a part of a weight": (
            v.transpose(1, 2).contiguous().transpose(1, 2),
            torch.cat([w_o, w_o], 1)[:, w_o.shape[1] :],
        ),
        "half of a row, a transposed weight": (torch.cat([v, v], 3)[..., 24:], w_o.t().contiguous().t()),
        "channels apart": (v.transpose(2, 3).contiguous().transpose(2, 3), w_o),
    }
    for name, (values, weight) in views.items():
        assert torch.equal(kernel.forward(args._replace(v=values, w_o=weight)), expected), name


def test_the_same_bits_every_time() -> None:
    args = draw(num_tokens=40, head_dim=32, d_model=200, dtype=torch.float16)
    assert torch.equal(kernel.forward(args), kernel.forward(args))


@pytest.mark.usefixtures("triton_backend")
def test_the_public_op_runs_it() -> None:
    args = draw(bounds=torch.tensor([[1, 18]], device=DEVICE))
    assert torch.equal(ops.value_projection_norm(args.v, args.w_o, bounds=args.bounds), kernel.forward(args))
