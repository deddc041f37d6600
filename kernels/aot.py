"""Compile every kernel for every target on a machine that needs no GPU, and say what came out.

    python -m condense_core.kernels.aot [--json] [--arch 90 ...] [--case OP or OP/NAME ...] [--cache FOLDER]

A case (aot_cases.py) is a call of an op's host code on meta tensors, at the shapes of Mistral-7B in bf16.
`launch.record` turns it into the launches that it would make on the target, and those are compiled with the
specialisations that a launch would have (pointers and sizes that divide by 16, sizes of 1). The machine code tells
registers, spills, the matrix instructions, and how wide the global loads of the innermost loops are, and
`Report.objections` says what of that is over the budget.

With `--cache` the reports are kept in FOLDER, and a launch whose source, specialisation, target and Triton are those of
a report is not compiled again. Any number of processes may share the folder.

Tests: tests/kernels/test_aot.py.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from condense_core.kernels import aot_cases
from condense_core.kernels.launch import OPTIONS, TARGETS, Launch, record

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}
_ALIGNED = [["tt.divisibility", 16]]
WIDE_SHARE = 0.75
"""Of the bytes that an inner loop loads from global memory, at least this share must come 16 at a time."""

# Hopper's warpgroup products, Blackwell's tensor memory products, and the warp products of every other generation.
_MATRIX = re.compile(r"\b(HGMMA|QGMMA|UTC\w*MMA|HMMA|IMMA|QMMA|OMMA)\b")
_LOAD = re.compile(r"(LDG|LDGSTS)((?:\.\w+)*)$")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s*([^;]*);")


@dataclass(frozen=True)
class Report:
    """What one launch became on one target.

    Attributes:
        case: name of the case, OP/NAME.
        kernel: name of the kernel.
        arch: the target, compute capability times ten.
        num_warps: warps of a block.
        registers: per thread.
        spills: local loads and stores in the machine code.
        stack: bytes of stack frame per thread.
        shared_memory: bytes per block.
        shared_memory_limit: what the target has of them.
        matrix: matrix instructions by name.
        loads: global loads in the innermost loops, or in the whole kernel when it has none, by bytes per thread.
    """

    case: str
    kernel: str
    arch: int
    num_warps: int
    registers: int
    spills: int
    stack: int
    shared_memory: int
    shared_memory_limit: int
    matrix: dict[str, int]
    loads: dict[int, int]

    @property
    def objections(self) -> list[str]:
        """What of the budget it exceeds: registers spilled, shared memory, narrow loads, the wrong matrix units."""
        found = []
        if self.spills or self.stack:
            found.append(f"{self.spills} spills, {self.stack} bytes of stack")
        if self.shared_memory > self.shared_memory_limit:
            found.append(f"{self.shared_memory} bytes of shared memory, the limit is {self.shared_memory_limit}")
        total = sum(width * count for width, count in self.loads.items())
        wide = sum(width * count for width, count in self.loads.items() if width >= 16)
        # Row vectors of a few numbers are left to be narrow.
        if wide < WIDE_SHARE * total and self.kernel not in aot_cases.NARROW:
            found.append(f"{wide} of {total} bytes per thread and turn of the inner loops come 16 at a time")
        if self.arch == 90 and self.kernel in aot_cases.WARPGROUP and "HGMMA" not in self.matrix:
            found.append(f"no warpgroup products (found {self.matrix or 'none'})")
        return found


def compile_case(name: str, arch: int, folder: Path | None = None) -> list[Report]:
    """One report per launch of the case `name`; those that `folder` has are read from it, others written to it."""
    with record(TARGETS[arch]) as launches:
        aot_cases.CASES[name]()
    return [_report(name, launch, arch, folder) for launch in launches]


def _report(case: str, launch: Launch, arch: int, folder: Path | None) -> Report:
    signature, constants, attrs = _specialise(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attrs)
    options = {**OPTIONS, "num_warps": launch.config.num_warps, "num_stages": launch.config.num_stages}
    key = f"{_tools()} {arch} {options} {source.hash()}"
    found = _kept(folder, key, lambda: _compile(source, arch, options))
    found["loads"] = {int(width): count for width, count in found["loads"].items()}  # JSON's keys are text
    limit = TARGETS[arch].shared_memory
    return Report(case=case, kernel=launch.kernel.__name__, arch=arch, shared_memory_limit=limit, **found)


def _compile(source: ASTSource, arch: int, options: dict[str, Any]) -> dict[str, Any]:
    """The fields of a report that come from the compiled kernel."""
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    metadata = compiled.metadata
    return {
        "num_warps": metadata.num_warps,
        "shared_memory": metadata.shared,
        **_disassemble(compiled.asm["cubin"]),
    }


def _kept(folder: Path | None, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` returned for `key` when it was first asked, from `folder`."""
    if folder is None:
        return make()
    file = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = json.dumps(make())
        # Written beside and renamed: whoever finds the file finds all of it.
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".unfinished", delete=False) as unfinished:
            unfinished.write(made)
        Path(unfinished.name).replace(file)
    kept: dict[str, Any] = json.loads(file.read_text())
    return kept


@cache
def _tools() -> str:
    """What turns a source into a report: Triton's version, with its compiler and disassembler, and this file."""
    return f"{triton.__version__} {hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}"


def _specialise(launch: Launch) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], Any]]:
    """Signature, constants and attributes, as Triton's launcher derives them from runtime arguments."""
    names = launch.kernel.arg_names
    values = dict(zip(names, launch.args, strict=False)) | dict(launch.constexprs)
    signature, constants, attrs = {}, {}, {}
    for index, name in enumerate(names):
        value = values[name]
        if value is None or name in launch.constexprs or (type(value) is int and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            if value.storage_offset() * value.element_size() % 16 == 0:
                attrs[(index,)] = _ALIGNED
        elif isinstance(value, bool):
            signature[name] = "u1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attrs[(index,)] = _ALIGNED
        else:
            signature[name] = "fp32"
    return signature, constants, attrs


def _disassemble(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("cuobjdump", "-sass", file.name)
    registers, stack = (int(re.findall(rf"\b{field}:(\d+)", usage)[0]) for field in ("REG", "STACK"))
    instructions = [(int(m[1], 16), m[2], m[3]) for m in _INSTRUCTION.finditer(code)]
    return {
        "registers": registers,
        "stack": stack,
        "spills": sum(op.split(".")[0] in ("LDL", "STL") for _, op, _ in instructions),
        "matrix": dict(Counter(m[1] for _, op, _ in instructions if (m := _MATRIX.match(op)))),
        "loads": dict(sorted(_load_widths(instructions).items())),
    }


def _load_widths(instructions: list[tuple[int, str, str]]) -> Counter[int]:
    """Global loads by width, in the innermost loops or, without a loop, everywhere."""
    loops = []
    for address, op, operands in instructions:
        target = re.search(r"0x([0-9a-f]+)", operands)
        # A branch to itself pads the end of every kernel.
        if op.startswith("BRA") and target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    widths: Counter[int] = Counter()
    for address, op, _ in instructions:
        if (match := _LOAD.match(op)) and (not inner or any(start <= address <= end for start, end in inner)):
            bits = next((int(part) for part in match[2].split(".") if part in ("64", "128", "256")), 32)
            narrow = next(
                (size for part, size in (("U8", 1), ("S8", 1), ("U16", 2), ("S16", 2)) if part in match[2]), None
            )
            widths[narrow or bits // 8] += 1
    return widths


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def main(argv: list[str] | None = None) -> int:
    """Compile, print, and return 1 if a kernel exceeds its budget."""
    parser = argparse.ArgumentParser(prog="python -m condense_core.kernels.aot", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=TARGETS, default=list(TARGETS), help="compute capabilities times ten"
    )
    ops = dict.fromkeys(name.split("/")[0] for name in aot_cases.CASES)
    known = [*ops, *aot_cases.CASES]
    parser.add_argument("--case", nargs="+", choices=known, default=list(ops), help="an op, or one case of it")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="where reports are kept, and looked for first")
    arguments = parser.parse_args(argv)
    if "TRITON_INTERPRET" in os.environ:
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing, unset it")
    names = [name for name in aot_cases.CASES if {name, name.split("/")[0]} & set(arguments.case)]
    work = [(*pair, arguments.cache) for pair in product(names, arguments.arch)]
    with ProcessPoolExecutor(min(len(work), len(os.sched_getaffinity(0)))) as pool:
        reports = [report for found in pool.map(compile_case, *zip(*work, strict=True)) for report in found]
    if arguments.json:
        print(json.dumps([asdict(report) | {"objections": report.objections} for report in reports], indent=1))
    else:
        print(_table(reports))
    return int(any(report.objections for report in reports))


def _table(reports: Iterable[Report]) -> str:
    lines = [
        f"{'case':38}{'kernel':26}{'sm':>4}{'warps':>6}{'regs':>5}{'spills':>7}{'shared':>8}  matrix; loads by bytes"
    ]
    for r in reports:
        found = ", ".join(f"{count} {name}" for name, count in r.matrix.items()) or "-"
        loads = ", ".join(f"{count} x {width}" for width, count in r.loads.items()) or "-"
        columns = f"{r.arch:>4}{r.num_warps:>6}{r.registers:>5}{r.spills:>7}{r.shared_memory:>8}"
        lines.append(f"{r.case:38}{r.kernel:26}{columns}  {found}; {loads}")
        lines += [f"    over budget: {objection}" for objection in r.objections]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
