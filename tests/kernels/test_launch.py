"""Launches: recorded instead of run, configurations that fit a target (kernels/launch.py)."""

import pytest
import torch
import triton
import triton.language as tl

from condense_core.kernels.launch import TARGETS, fitting, launch, record, target_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@triton.jit
def _fill_kernel(
    out_ptr,  # (size,) fp32
    size,
    value,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + place, tl.zeros([BLOCK], tl.float32) + value, mask=place < size)


CONFIGS = [triton.Config({"BLOCK": block}, num_warps=1) for block in (16, 8)]


def fill(out: torch.Tensor, value: float) -> None:
    launch(
        _fill_kernel,
        lambda options: (triton.cdiv(len(out), options["BLOCK"]),),
        *(out, len(out), value),
        configs=CONFIGS[:1],
    )


def test_a_launch_runs() -> None:
    out = torch.zeros(20, device=DEVICE)
    fill(out, 3.0)
    assert out.eq(3.0).all()


def test_an_empty_grid_runs_nothing() -> None:
    with record(TARGETS[90]) as launches:
        fill(torch.zeros(0), 3.0)
    assert launches == []


def test_a_recording_runs_nothing_and_takes_down_everything() -> None:
    out = torch.zeros(20, device=DEVICE)
    with record(TARGETS[80]) as launches:
        fill(out, 3.0)
        assert target_of(DEVICE) is TARGETS[80]
    assert out.eq(0.0).all()
    (made,) = launches
    assert made.kernel is _fill_kernel
    assert made.grid == (2,)
    assert (made.args[0] is out, made.args[1:]) == (True, (20, 3.0))
    assert (made.constexprs, made.config) == ({"BLOCK": 16}, CONFIGS[0])
    assert target_of(DEVICE) is not TARGETS[80]


@pytest.mark.parametrize(
    ("bytes_per_element", "blocks"),
    [
        pytest.param(1, [16, 8], id="both-fit"),
        pytest.param(12_000, [8], id="the-smaller-one-fits"),
        pytest.param(100_000, [8], id="none-fits-and-the-smallest-is-left"),
    ],
)
def test_configurations_that_fit(bytes_per_element: int, blocks: list[int]) -> None:
    fit = fitting(CONFIGS, TARGETS[89], lambda config: config.kwargs["BLOCK"] * bytes_per_element)
    assert [config.kwargs["BLOCK"] for config in fit] == blocks
