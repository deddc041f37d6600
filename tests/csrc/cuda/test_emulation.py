"""The sanitizers find planted errors in emulated kernels, and the emulation computes what a GPU does."""

from collections.abc import Callable
from typing import Any

import pytest

# An error, the same kernel without it, what finds it, and what that says.
PLANTED = {
    "a missing barrier": ("race", "clean", "thread", "data race"),
    "a missing barrier of a warp": ("race_warp", "clean_warp", "thread", "data race"),
    "beyond static shared memory": ("beyond_shared", "clean", "address", "global-buffer-overflow"),
    "beyond dynamic shared memory": ("beyond_dynamic", "clean_dynamic", "address", "heap-buffer-overflow"),
    "beyond global memory": ("beyond_global", "clean", "address", "heap-buffer-overflow"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("error", "clean", "found_by", "report"), PLANTED.values(), ids=PLANTED)
def test_a_planted_error_is_found_and_a_clean_kernel_passes(
    error: str, clean: str, found_by: str, report: str, planted: Callable[[str], Any]
) -> None:
    program = planted(found_by)
    passed = program.run(clean)
    assert passed.returncode == 0, passed.stderr
    wrong = program.run(error)
    assert wrong.returncode != 0
    assert report in wrong.stderr


@pytest.mark.slow
def test_the_emulation_computes_what_a_gpu_does(sanitizer: str, planted: Callable[[str], Any]) -> None:
    done = planted(sanitizer).run("primitives")
    assert done.returncode == 0, done.stderr
