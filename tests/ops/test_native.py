"""The extension is found, or its absence explained once; tensors reach it as they are."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from condense_core import ops
from condense_core.ops import native
from condense_core.ops.arguments import KeyNormArgs
from condense_core.ops.backends import REGISTRY

built = pytest.mark.skipif(native.missing() is not None, reason=f"no extension: {native.missing()}")


@pytest.fixture(autouse=True)
def fresh() -> Any:
    """Every test looks for the extension anew, and so do those after it."""
    native.load.cache_clear()
    yield
    native.load.cache_clear()


def without(monkeypatch: pytest.MonkeyPatch, error: ImportError, files: list[str], tmp_path: Path) -> None:
    """Stand in a package folder with these files, whose extension cannot be imported."""
    (tmp_path / "ops").mkdir()
    for name in files:
        (tmp_path / name).touch()

    def fail(name: str) -> Any:
        raise error

    monkeypatch.setattr(native, "import_module", fail)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "ops" / "native.py"))


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([], "this installation has none: it was made without a C++ compiler"),
        (["_C.cpython-38-x86_64-linux-gnu.so"], "_C.cpython-38-x86_64-linux-gnu.so is for another Python or platform"),
        (["_C.abi3.so"], "_C.abi3.so cannot be loaded: undefined symbol"),
    ],
)
def test_what_is_missing_is_said_once_and_the_reference_runs(
    files: list[str],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    without(monkeypatch, ImportError("undefined symbol"), files, tmp_path)
    k = torch.randn(1, 2, 5, 4)
    with caplog.at_level(logging.WARNING, "condense_core"):
        for _ in range(3):
            assert torch.equal(ops.key_norm(k), -k.norm(dim=-1))
    lines = [record.getMessage() for record in caplog.records]
    assert len([line for line in lines if reason in line]) == 1, lines
    assert REGISTRY.resolve("key_norm", KeyNormArgs(k, sink=0, window=0, bounds=None)).name == "reference"
    rows = {row.op: row for row in REGISTRY.table() if row.backend == "cpu"}
    assert not rows["key_norm"].available
    assert reason in (rows["key_norm"].why_not or "")
    with pytest.raises(ImportError, match=re.escape(reason)):
        native.extension()


def test_an_extension_of_another_version_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "import_module", lambda name: SimpleNamespace(version="0.0.1"))
    assert "was built for condense_core 0.0.1" in (native.missing() or "")
    assert "install again" in caplog.text


@built
def test_arguments_of_a_wrong_kind_raise_typed_errors() -> None:
    cpu = native.extension().cpu
    k, out = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        cpu.key_norm("k", 0, 0, None, native.view(out), 1)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        cpu.key_norm((0, 0, (1,), ("a",)), 0, 0, None, native.view(out), 1)
    with pytest.raises(ValueError, match=r"key_norm: k has shape \[1, 4, 8\], expected 4 dimensions"):
        cpu.key_norm(native.view(k[0]), 0, 0, None, native.view(out), 1)
    with pytest.raises(ValueError, match="instruction set 'sse9' is not available here, expected one of baseline"):
        cpu.use_instruction_set("sse9")


@built
def test_kernels_use_the_threads_that_torch_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    spy = SimpleNamespace(cpu=SimpleNamespace(probe=lambda **arguments: seen.append(arguments)))
    monkeypatch.setattr(native, "extension", lambda: spy)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            native.call("probe", bounds=None, sink=3)
    finally:
        torch.set_num_threads(before)
    assert seen == [{"bounds": None, "sink": 3, "threads": threads} for threads in (1, 2)]


@built
def test_the_environment_chooses_the_instruction_set() -> None:
    code = "from condense_core.ops import native; print(native.extension().cpu.instruction_set())"
    for asked, expected in (("baseline", "baseline"), ("sse9", None), ("", None)):
        environment = os.environ | {"CONDENSE_CPU_ISA": asked}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )
        names = native.extension().cpu.instruction_sets()
        assert done.stdout.strip() == (expected or names[-1]), done.stderr
