"""Runs the CUDA kernels without a GPU: csrc/emulation compiles them for the CPU, under a sanitizer of g++.

AddressSanitizer finds accesses beyond a tensor or shared memory, ThreadSanitizer missing barriers. The first runs every
day; the second, which takes many times as long, with the slow tests.
"""

import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core.ops.cuda import attention_pool, compact, ragged_append, select
from condense_core.ops.native import DTYPE_CODES

CHECKOUT = Path(__file__).resolve().parents[3]
FLAGS = ("-std=c++20", "-O1", "-g", "-DNDEBUG", "-pthread", "-w", "-fno-sanitize-recover=all", "-Icsrc")


@cache
def missing(sanitizer: str) -> str | None:
    """Why nothing can be built with this sanitizer here, or None."""
    if shutil.which("g++") is None:
        return "there is no g++"
    with TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.cpp"
        probe.write_text("int main() {}")
        command = ["g++", f"-fsanitize={sanitizer}", str(probe), "-o", str(probe.with_suffix(""))]
        failed = subprocess.run(command, capture_output=True, text=True).returncode
    return f"g++ has no -fsanitize={sanitizer}" if failed else None


@cache
def parameters(op: str) -> list[str]:
    """The names of the parameters of a kernel in csrc/cuda/cuda.h, in its order; no stream."""
    header = (CHECKOUT / "csrc" / "cuda" / "cuda.h").read_text()
    declared = re.search(rf"void {op}\(([^()]*)\);", header)
    assert declared is not None
    *names, stream = [parameter.split()[-1] for parameter in declared[1].split(",")]
    assert stream == "stream"
    return names


class Program:
    """A program of emulated kernels, compiled under a sanitizer."""

    def __init__(self, path: Path) -> None:
        """Take the program at `path`."""
        self.path = path

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run it. Addresses stay where ThreadSanitizer wants them: newer kernels scatter them too widely for it."""
        fixed = ["setarch", "-R"] if shutil.which("setarch") else []
        return subprocess.run([*fixed, str(self.path), *arguments], capture_output=True, text=True, timeout=300)


class Emulation:
    """The CUDA kernels, called as through the bindings: by name, on CPU tensors, which they write."""

    def __init__(self, program: Program, folder: Path) -> None:
        """Cases and results go through files in `folder`."""
        self.program, self.folder = program, folder

    def run(self, op: str, **arguments: Any) -> None:
        """Run one kernel."""
        self.run_all([(op, arguments)])

    def run_all(self, cases: Sequence[tuple[str, dict[str, Any]]]) -> None:
        """Run `(op, arguments)` one after another.

        Raises:
            AssertionError: a sanitizer had something to say, or a kernel refused its arguments.
        """
        refused = self.refusals(cases)
        assert not refused, refused

    def refusals(self, cases: Sequence[tuple[str, dict[str, Any]]]) -> dict[int, str]:
        """What `run_all` does, and the errors of kernels that refused their arguments, by the place of the case."""
        ordered = [(op, [arguments[name] for name in parameters(op)]) for op, arguments in cases]
        assert all(set(arguments) == set(parameters(op)) for op, arguments in cases)
        (self.folder / "cases").write_bytes(b"".join(_case(op, arguments) for op, arguments in ordered))
        done = self.program.run(str(self.folder / "cases"), str(self.folder / "results"))
        assert done.returncode == 0, done.stderr[-8000:]
        results = (self.folder / "results").read_bytes()
        for tensor in _tensors(ordered):
            span = _span(tensor)
            size = span.numel() * span.element_size()
            if size:
                span.copy_(torch.frombuffer(bytearray(results[:size]), dtype=tensor.dtype))
            results = results[size:]
        assert not results
        return {int(place): text for place, text in re.findall(r"^refused (\d+): (.*)$", done.stderr, re.MULTILINE)}


def _span(tensor: Tensor) -> Tensor:
    """All memory from a tensor's first element to its last."""
    if tensor.numel() == 0:
        return tensor.new_zeros(0)
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((length,), (1,))


def _tensors(cases: list[tuple[str, list[Any]]]) -> Iterable[Tensor]:
    for _, arguments in cases:
        for argument in arguments:
            if isinstance(argument, Tensor):
                yield argument
            elif isinstance(argument, list):
                yield from argument


def _case(op: str, arguments: list[Any]) -> bytes:
    """As csrc/emulation/run_cases.cpp reads it."""
    parts = [bytes([len(op)]), op.encode()]
    for argument in arguments:
        if argument is None:
            parts.append(b"n")
        elif isinstance(argument, Tensor):
            parts += [b"t", _view(argument)]
        elif isinstance(argument, list):
            parts += [b"l", struct.pack("<q", len(argument)), *map(_view, argument)]
        elif isinstance(argument, float):
            parts += [b"d", struct.pack("<d", argument)]
        else:
            parts += [b"i", struct.pack("<q", argument)]
    return b"".join([*parts, b"."])


def _view(tensor: Tensor) -> bytes:
    span = _span(tensor)
    data = span.contiguous().view(torch.uint8).numpy().tobytes() if span.numel() else b""
    numbers = [DTYPE_CODES[tensor.dtype], tensor.dim(), *tensor.shape, *tensor.stride(), len(data)]
    return struct.pack(f"<{len(numbers)}q", *numbers) + data


@pytest.fixture(params=["address", pytest.param("thread", marks=pytest.mark.slow)])
def sanitizer(request: pytest.FixtureRequest) -> str:
    """The sanitizer that the kernels are compiled with."""
    if reason := missing(request.param):
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture
def build(built_once: Callable[[str, str, Callable[[Path], object]], Path]) -> Callable[..., Program]:
    """``build(sanitizer, *sources)``: a program of sources of the checkout, compiled once until one of them changes."""

    def made(sanitizer: str, *sources: str) -> Program:
        command = ["g++", *FLAGS, f"-fsanitize={sanitizer}", "-x", "c++", *sources]
        version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
        read = [*sorted((CHECKOUT / "csrc").rglob("*.[hc]*")), *(CHECKOUT / source for source in sources)]
        key = "\n".join([version, *command, *(path.read_text() for path in read)])

        def compile_to(folder: Path) -> None:
            subprocess.run([*command, "-o", str(folder / "program")], cwd=CHECKOUT, check=True, timeout=600)

        return Program(built_once(f"{Path(sources[0]).stem}-{sanitizer}", key, compile_to) / "program")

    return made


@pytest.fixture
def planted(build: Callable[..., Program]) -> Callable[[str], Program]:
    """``planted(sanitizer)``: the kernels of planted.cpp, most of which are wrong."""
    return lambda sanitizer: build(sanitizer, "tests/csrc/cuda/planted.cpp")


@pytest.fixture
def emulation(sanitizer: str, build: Callable[..., Program], tmp_path: Path) -> Emulation:
    """All CUDA kernels, emulated."""
    kernels = sorted(str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "csrc" / "cuda").glob("*.cu"))
    program = build(sanitizer, "csrc/emulation/run_cases.cpp", "csrc/condense/tensor.cpp", *kernels)
    return Emulation(program, tmp_path)


@pytest.fixture
def launched(emulation: Emulation, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the functions of condense_core.ops.cuda launch runs in the emulation; the names of the kernels."""
    names: list[str] = []

    def launch(op: str, _: torch.device, **arguments: Any) -> None:
        names.append(op)
        emulation.run(op, **arguments)

    for module in (attention_pool, compact, ragged_append, select):
        monkeypatch.setattr(module, "launch", launch)
    return names
