"""The compiled kernels are tested on every instruction set that this processor runs."""

from collections.abc import Iterator

import pytest
import torch

from condense_core.ops import native

INSTRUCTION_SETS = native.extension().cpu.instruction_sets() if native.missing() is None else []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`isa` runs over the instruction sets, `dtype` over what kernels take."""
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", INSTRUCTION_SETS, indirect=True)
    if "dtype" in metafunc.fixturenames and not any(
        "dtype" in str(mark.args[0]).split(",") for mark in metafunc.definition.iter_markers("parametrize")
    ):
        dtypes = [torch.float32, torch.bfloat16, torch.float16]
        metafunc.parametrize("dtype", dtypes, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels run with the instruction set `isa` during the test."""
    cpu = native.extension().cpu
    before = cpu.instruction_set()
    cpu.use_instruction_set(request.param)
    yield request.param
    cpu.use_instruction_set(before)
