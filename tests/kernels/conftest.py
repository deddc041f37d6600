"""Where the kernels are tested: on the GPU where there is one, else in Triton's interpreter on the CPU.

The interpreter is chosen when triton is imported, so this stands before any import of a kernel. Other tests of the same
process are not affected: the registry gives CPU tensors to Triton only if CONDENSE_BACKEND asks for it.
"""

import os
import sys
from unittest.mock import MagicMock

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest

try:
    import hypothesis  # noqa: F401
except ModuleNotFoundError:  # a machine lent for its GPU may lack it: property tests are skipped there
    stand_in = MagicMock()
    stand_in.settings = lambda *_, **__: lambda test: test
    stand_in.given = lambda *_, **__: pytest.mark.skip(reason="hypothesis is not installed")
    sys.modules["hypothesis"], sys.modules["hypothesis.strategies"] = stand_in, stand_in.strategies

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that kernels run on."""
    return DEVICE


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`dtype` runs over fp32 and fp16, and bf16 on a GPU: the interpreter's bf16 `tl.dot` is wrong (triton 3.9)."""
    if "dtype" in metafunc.fixturenames and not any(
        "dtype" in str(mark.args[0]).split(",") for mark in metafunc.definition.iter_markers("parametrize")
    ):
        dtypes = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE.type == "cuda")
        metafunc.parametrize("dtype", dtypes, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the public ops run on Triton, in the interpreter too."""
    monkeypatch.setenv("CONDENSE_BACKEND", "triton")
