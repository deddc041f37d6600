"""What nvcc makes of the kernels: for every target no spills, and blocks that fit a multiprocessor."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[3]
TARGETS = (80, 86, 89, 90, 100, 120)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
@pytest.mark.parametrize("source", sorted((CHECKOUT / "csrc" / "cuda").glob("*.cu")), ids=lambda path: path.name)
def test_nothing_spills_and_a_block_fits(source: Path, tmp_path: Path) -> None:
    targets = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in TARGETS]
    command = ["nvcc", "-std=c++20", "-O3", "-DNDEBUG", f"-I{CHECKOUT / 'csrc'}", *targets, "--threads=0", "-Xptxas=-v"]
    done = subprocess.run(
        [*command, "-c", str(source), "-o", str(tmp_path / "out.o")], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(spills) == 2 * len(registers) > 0
    assert set(spills) == {"0"}
    threads = max(int(number) for number in re.findall(r"kThreads = CONDENSE_BLOCK\((\d+)\)", source.read_text()))
    # How many blocks a multiprocessor should hold is in each kernel's launch bounds, which ptxas keeps or spills.
    assert max(registers) * threads <= 65_536
