"""What nvcc makes of the kernels: for every target no spills, and blocks that fit a multiprocessor."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[3]
TARGETS = (80, 86, 89, 90, 100, 120)


@pytest.fixture
def assembled(built_once: Callable[[str, str, Callable[[Path], object]], Path]) -> Callable[[Path], str]:
    """``assembled(source)``: what ptxas says of a kernel's file, compiled once until its sources change."""

    def report(source: Path) -> str:
        targets = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in TARGETS]
        command = ["nvcc", "-std=c++20", "-O3", "-DNDEBUG", "-Icsrc", *targets, "--threads=0", "-Xptxas=-v"]
        version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
        headers = sorted([*(CHECKOUT / "csrc" / "cuda").glob("*.h"), *(CHECKOUT / "csrc" / "condense").glob("*.h")])
        key = "\n".join([version, *command, *(path.read_text() for path in (source, *headers))])

        def compile_to(folder: Path) -> None:
            line = [*command, "-c", str(source), "-o", str(folder / "kernel.o")]
            done = subprocess.run(line, cwd=CHECKOUT, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stderr
            (folder / "report.txt").write_text(done.stderr)

        return (built_once(f"nvcc-{source.stem}", key, compile_to) / "report.txt").read_text()

    return report


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
@pytest.mark.parametrize("source", sorted((CHECKOUT / "csrc" / "cuda").glob("*.cu")), ids=lambda path: path.name)
def test_nothing_spills_and_a_block_fits(source: Path, assembled: Callable[[Path], str]) -> None:
    report = assembled(source)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", report)]
    assert len(spills) == 2 * len(registers) > 0
    assert set(spills) == {"0"}
    threads = max(int(number) for number in re.findall(r"kThreads = CONDENSE_BLOCK\((\d+)\)", source.read_text()))
    # How many blocks a multiprocessor should hold is in each kernel's launch bounds, which ptxas keeps or spills.
    assert max(registers) * threads <= 65_536
