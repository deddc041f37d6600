"""The build: what it does without a compiler or an nvcc, what it refuses, and what it must not put into an object."""

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]


def setup(tmp_path: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py on a copy of the checkout."""
    source = tmp_path / "source"
    if not source.exists():
        ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "runs", "models", "*.so")
        shutil.copytree(CHECKOUT, source, ignore=ignored)
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("CONDENSE_", "CXX", "CUDA_"))} | environment
    line = [sys.executable, "setup.py", *command]
    return subprocess.run(line, cwd=source, env=variables, capture_output=True, text=True, timeout=300)


def test_without_a_compiler_a_pure_wheel_is_built_and_says_so(tmp_path: Path) -> None:
    done = setup(tmp_path, "--quiet", "bdist_wheel", PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "condense_core: there is no C++ compiler" in done.stderr
    (wheel,) = (tmp_path / "source" / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if "_C" in name or name.endswith(".so")]
    others = [path for path in (CHECKOUT / "condense_core").rglob("*") if path.suffix in (".html", ".txt", ".md")]
    assert {path.relative_to(CHECKOUT).as_posix() for path in others} <= set(names)
    assert "condense_core/serving/http/page.html" in names


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"CONDENSE_EXTENSION": "1", "PATH": ""}, "error: CONDENSE_EXTENSION=1, but there is no C++ compiler"),
        ({"CONDENSE_EXTENSION": "yes"}, "error: CONDENSE_EXTENSION='yes', expected auto, 0 or 1"),
        ({"CONDENSE_CUDA": "1", "PATH": "{compiler only}"}, "error: CONDENSE_CUDA=1, but there is no nvcc"),
    ],
)
def test_what_cannot_be_built_is_an_error_when_it_is_asked_for(
    variables: dict[str, str], message: str, tmp_path: Path
) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if "{compiler only}" in variables.values():
        if compiler is None or Path("/usr/local/cuda/bin/nvcc").exists():
            pytest.skip("needs a C++ compiler, and no nvcc where CUDA installs itself")
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "g++").symlink_to(compiler)
        variables = variables | {"PATH": str(tmp_path / "bin")}
    done = setup(tmp_path, "--version", **variables)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None or shutil.which("g++") is None, reason="needs nvcc and g++")
def test_targets_that_nvcc_does_not_know_are_refused(tmp_path: Path) -> None:
    done = setup(tmp_path, "build_ext", CONDENSE_CUDA="1", CONDENSE_CUDA_ARCHS="9.0;3.5")
    assert done.returncode != 0
    assert "error: CONDENSE_CUDA_ARCHS='9.0;3.5', expected capabilities" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("g++") is None, reason="needs g++ on x86-64")
def test_no_function_of_one_instruction_set_can_be_taken_for_another_s(
    built_once: Callable[[str, str, Callable[[Path], object]], Path],
) -> None:
    """The linker merges weak symbols, whichever copy comes first: one made for AVX-512 would stop older processors."""
    flags = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-w", "-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"]
    command = ["g++", *flags, "-Icsrc", "-c", "csrc/cpu/isa_avx2.cpp"]
    sources = sorted([*(CHECKOUT / "csrc" / "cpu").rglob("*"), *(CHECKOUT / "csrc" / "condense").rglob("*")])
    key = "\n".join([*command, *(path.read_text() for path in sources if path.is_file())])

    def compile_to(folder: Path) -> None:
        subprocess.run([*command, "-o", str(folder / "avx2.o")], cwd=CHECKOUT, check=True, timeout=300)

    output = built_once("isa_avx2", key, compile_to) / "avx2.o"
    listing = subprocess.run(["nm", "-C", "--defined-only", output], capture_output=True, text=True, check=True).stdout
    symbols = [line.split(maxsplit=2)[1:] for line in listing.splitlines()]
    shared = [name for kind, name in symbols if kind in "WVuTDB" and "avx2::" not in name]
    # Data of the C++ runtime: names of exception types, no instructions.
    assert [name for name in shared if not name.startswith(("DW.ref.", "typeinfo ", "vtable "))] == []
