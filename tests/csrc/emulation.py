"""Runs the CUDA kernels without a GPU: compiles them with csrc/emulation under a sanitizer, and gives them cases."""

import re
import shutil
import struct
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor

from condense_core.ops.native import DTYPE_CODES

CHECKOUT = Path(__file__).resolve().parents[2]
SANITIZERS = ("address", "thread")


@cache
def missing(sanitizer: str) -> str | None:
    """Why nothing can be built with this sanitizer here, or None."""
    if shutil.which("g++") is None:
        return "there is no g++"
    probe = Path(mkdtemp()) / "probe.cpp"
    probe.write_text("int main() {}")
    command = ["g++", f"-fsanitize={sanitizer}", str(probe), "-o", str(probe.with_suffix(""))]
    done = subprocess.run(command, capture_output=True, text=True)
    return f"g++ has no -fsanitize={sanitizer}" if done.returncode else None


@cache
def build(sanitizer: str, main: str) -> Path:
    """The program of `main`, a file of the checkout, with all kernels, under a sanitizer; compiled once."""
    target = Path(mkdtemp(prefix="condense-emulation-")) / "program"
    flags = [
        "-std=c++20",
        "-O1",
        "-g",
        "-DNDEBUG",
        "-pthread",
        "-w",
        f"-I{CHECKOUT / 'csrc'}",
        f"-fsanitize={sanitizer}",
    ]
    kernels = sorted(map(str, (CHECKOUT / "csrc" / "cuda").glob("*.cu"))) if "run_cases" in main else []
    command = [
        "g++",
        *flags,
        "-fno-sanitize-recover=all",
        "-x",
        "c++",
        str(CHECKOUT / main),
        *kernels,
        "-o",
        str(target),
    ]
    subprocess.run(command, check=True, timeout=600)
    return target


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it. Addresses stay where ThreadSanitizer wants them: newer kernels scatter them too widely for it."""
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    return subprocess.run([*fixed, str(program), *arguments], capture_output=True, text=True, timeout=300)


def run_cases(sanitizer: str, cases: Iterable[tuple[str, list[Any]]], folder: Path) -> None:
    """Run `(op, arguments)` one after another; tensors among the arguments are overwritten with what the kernels left.

    Raises:
        AssertionError: a sanitizer had something to say, which the message is.
    """
    cases = list(cases)
    (folder / "cases").write_bytes(b"".join(_case(name, arguments) for name, arguments in cases))
    program = build(sanitizer, "csrc/emulation/run_cases.cpp")
    done = run(program, str(folder / "cases"), str(folder / "results"))
    assert done.returncode == 0, done.stderr[-8000:]
    results = (folder / "results").read_bytes()
    for tensor in _tensors(cases):
        span = _span(tensor)
        size = span.numel() * span.element_size()
        if size:
            span.copy_(torch.frombuffer(bytearray(results[:size]), dtype=tensor.dtype))
        results = results[size:]
    assert not results


@cache
def parameters(kernel: str) -> list[str]:
    """The names of the parameters of a kernel in csrc/cuda/cuda.h, in its order, which `run_cases` keeps; no stream."""
    header = (CHECKOUT / "csrc" / "cuda" / "cuda.h").read_text()
    declared = re.search(rf"void {kernel}\(([^()]*)\);", header)
    assert declared is not None
    *names, stream = [parameter.split()[-1] for parameter in declared[1].split(",")]
    assert stream == "stream"
    return names


def _span(tensor: Tensor) -> Tensor:
    """All memory from a tensor's first element to its last."""
    if tensor.numel() == 0:
        return tensor.new_empty(0)
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((length,), (1,))


def _tensors(cases: list[tuple[str, list[Any]]]) -> Iterable[Tensor]:
    for _, arguments in cases:
        for argument in arguments:
            if isinstance(argument, Tensor):
                yield argument
            elif isinstance(argument, list):
                yield from argument


def _case(name: str, arguments: list[Any]) -> bytes:
    parts = [bytes([len(name)]), name.encode()]
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
