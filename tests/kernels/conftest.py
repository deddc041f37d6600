"""Where the kernels are tested: on the GPU where there is one, else in Triton's interpreter on the CPU.

The interpreter was chosen in the conftest above, before anything imported triton.
"""

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
