"""What tests of compiled kernels share: the instruction sets, dtypes, numbers of threads, and memory full of NaN."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from condense_core.ops import native

INSTRUCTION_SETS = native.extension().cpu.instruction_sets() if native.missing() is None else []
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`isa` runs over the instruction sets of this processor, `dtype` over the dtypes that kernels take.

    Every kernel runs with the oldest instruction set and with the one that users of this machine get; those between
    share their sources with these and are slow.
    """
    if "isa" in metafunc.fixturenames:
        slow = INSTRUCTION_SETS[1:-1]
        values = [pytest.param(isa, marks=[pytest.mark.slow] * (isa in slow)) for isa in INSTRUCTION_SETS]
        metafunc.parametrize("isa", values, indirect=True)
    own = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "dtype" in metafunc.fixturenames and not any("dtype" in names for names in own):
        metafunc.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is no extension, tests of its kernels are skipped, and say why."""
    if (reason := native.missing()) is None:
        return
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.skip(reason=f"no extension: {reason}"))


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels run with the instruction set `isa` during the test."""
    cpu = native.extension().cpu
    before = cpu.instruction_set()
    cpu.use_instruction_set(request.param)
    yield request.param
    cpu.use_instruction_set(before)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    """`torch.empty` and its like give NaN, integers their largest value: an output that is not written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def threads_agree() -> Callable[..., None]:
    """`threads_agree(run, 1, 2, 7)`: what `run()` returns, a list of tensors, has the same bits on so many threads."""

    def check(run: Callable[[], Any], *numbers: int) -> None:
        before, results = torch.get_num_threads(), []
        try:
            for number in numbers:
                torch.set_num_threads(number)
                results.append(list(run()))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            for mine, theirs in zip(results[0], other, strict=True):
                assert torch.equal(mine, theirs)

    return check
