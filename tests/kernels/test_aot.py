"""Every kernel, compiled for every target without a GPU, within its budget of registers and shared memory."""

import json
import os
import subprocess
import sys
from types import ModuleType

import pytest

pytest.importorskip("triton")

from condense_core.kernels import aot, aot_cases
from condense_core.kernels.launch import TARGETS, Launch, record


def run_aot(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m condense_core.kernels.aot`, without the interpreter that the other tests run in."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "condense_core.kernels.aot", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1_500)


@pytest.mark.slow
def test_every_kernel_fits_every_target() -> None:
    done = run_aot("--json")
    assert done.stdout, done.stderr
    reports = json.loads(done.stdout)
    over = [f"{r['case']} {r['kernel']} sm_{r['arch']}: {o}" for r in reports for o in r["objections"]]
    assert not over, "\n".join(over)
    assert done.returncode == 0, done.stderr
    assert {r["arch"] for r in reports} == set(TARGETS)
    assert {r["case"] for r in reports} == set(aot_cases.CASES)
    assert set(aot_cases.WARPGROUP) <= {r["kernel"] for r in reports}


def report(**changes: object) -> aot.Report:
    fields = {
        "case": "case",
        "kernel": "kernel",
        "arch": 90,
        "num_warps": 4,
        "registers": 32,
        "spills": 0,
        "stack": 0,
        "shared_memory": 0,
        "shared_memory_limit": 100,
        "matrix": {},
        "loads": {16: 4, 2: 1},
    }
    return aot.Report(**{**fields, **changes})


def test_the_budget_can_be_exceeded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert report().objections == []
    assert "3 spills" in report(spills=3).objections[0]
    assert "8 bytes of stack" in report(stack=8).objections[0]
    assert "101 bytes of shared memory" in report(shared_memory=101).objections[0]
    assert "64 of 128 bytes" in report(loads={16: 4, 4: 16}).objections[0]
    monkeypatch.setattr(aot_cases, "WARPGROUP", {"kernel"})
    assert "no warpgroup products" in report(matrix={"HMMA": 4}).objections[0]
    assert report(matrix={"HGMMA": 4}).objections == []
    assert report(arch=80, matrix={"HMMA": 4}).objections == []


def test_every_kernel_module_has_a_case() -> None:
    """Every jitted kernel that host code can launch is met by some case, so that none escapes the budget."""
    launched: set[str] = set()
    for case in aot_cases.CASES.values():
        with record(TARGETS[90]) as launches:
            case()
        launched |= {launch.kernel.__name__ for launch in launches}
    defined = {
        name
        for module in vars(aot_cases).values()
        if isinstance(module, ModuleType) and module.__name__.startswith("condense_core.kernels.")
        for name in vars(module)
        if name.endswith("_kernel")
    }
    assert defined <= launched, defined - launched


def test_recording_launches_nothing() -> None:
    with record(TARGETS[90]) as launches:
        aot_cases.CASES["attention_pool/4x"]()
    assert [type(launch) for launch in launches] == [Launch]


def test_a_line_of_machine_code_is_read_as_it_stands() -> None:
    line = "        /*06a0*/                   LDGSTS.E.BYPASS.128 [R26], desc[UR30][R4.64], P0 ;     /* 0x1 */\n"
    narrow = "        /*1d30*/              @P0 LDG.E.U16 R10, desc[UR30][R4.64] ;      /* 0x1 */\n"
    barrier = "        /*08b0*/                   LDGDEPBAR ;                      /* 0x1 */\n"
    back = "        /*1e00*/             @!P0 BRA 0x600 ;                       /* 0x1 */\n"
    instructions = [(int(m[1], 16), m[2], m[3]) for m in aot._INSTRUCTION.finditer(line + barrier + narrow + back)]
    assert len(instructions) == 4
    assert aot._load_widths(instructions) == {16: 1, 2: 1}
    outside = "        /*1f00*/                   LDG.E.128 R10, desc[UR30][R4.64] ;      /* 0x1 */\n"
    found = aot._INSTRUCTION.finditer(line + narrow + back + outside)
    assert aot._load_widths([(int(m[1], 16), m[2], m[3]) for m in found]) == {16: 1, 2: 1}


def test_the_interpreter_and_the_compiler_exclude_each_other() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "condense_core.kernels.aot", "--arch", "90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "unset it" in done.stderr
