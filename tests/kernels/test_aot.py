"""Every kernel, compiled without a GPU (kernels/aot.py), within its budget of registers and shared memory."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from condense_core import kernels
from condense_core.kernels import aot, aot_cases
from condense_core.kernels.launch import TARGETS, record

OPS = {
    module.name: importlib.import_module(f"condense_core.kernels.{module.name}")
    for module in pkgutil.iter_modules(kernels.__path__)
    if (Path(kernels.__path__[0]) / f"{module.name}.py").read_text().count("@triton.jit")
    and module.name not in ("common", "launch", "aot")
}
"""Modules of kernels by the op that they are named after."""


def first_cases() -> dict[str, str]:
    """The most usual case of every op."""
    return {name.split("/")[0]: name for name in reversed(aot_cases.CASES)}


def run_aot(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m condense_core.kernels.aot`, without the interpreter that the other tests run in.

    Compilations are kept from one run of the tests to the next: CONDENSE_TEST_CACHE says where.
    """
    folder = os.environ.get("CONDENSE_TEST_CACHE") or Path.home() / ".cache" / "condense_core" / "tests"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "condense_core.kernels.aot", "--cache", str(Path(folder) / "aot"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1_500)


def assert_within_budget(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.stdout, done.stderr
    reports: list[dict[str, Any]] = json.loads(done.stdout)
    over = [f"{r['case']} {r['kernel']} sm_{r['arch']}: {o}" for r in reports for o in r["objections"]]
    assert not over, "\n".join(over)
    assert done.returncode == 0, done.stderr
    return reports


def test_the_first_case_of_every_op_fits_hopper() -> None:
    cases = first_cases().values()
    reports = assert_within_budget(run_aot("--json", "--arch", "90", "--case", *cases))
    assert {r["case"] for r in reports} == set(cases)


@pytest.mark.slow
def test_every_case_fits_every_target() -> None:
    reports = assert_within_budget(run_aot("--json"))
    assert {(r["case"], r["arch"]) for r in reports} == {(case, arch) for case in aot_cases.CASES for arch in TARGETS}
    assert set(aot_cases.WARPGROUP) <= {r["kernel"] for r in reports}


def report(**changes: Any) -> aot.Report:
    """One without an objection, but for `changes`."""
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


@pytest.mark.parametrize(
    ("changes", "objection"),
    [
        pytest.param({"spills": 3}, "3 spills", id="spills"),
        pytest.param({"stack": 8}, "8 bytes of stack", id="stack"),
        pytest.param({"shared_memory": 101}, "101 bytes of shared memory", id="shared-memory"),
        pytest.param({"loads": {16: 4, 4: 16}}, "64 of 128 bytes", id="narrow-loads"),
        pytest.param(
            {"kernel": "_projection_kernel", "matrix": {"HMMA": 4}},
            "no warpgroup products",
            id="warp-products-on-sm_90",
        ),
    ],
)
def test_the_budget_can_be_exceeded(changes: dict[str, Any], objection: str) -> None:
    (found,) = report(**changes).objections
    assert objection in found


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="nothing-special"),
        pytest.param({"kernel": "_projection_kernel", "matrix": {"HGMMA": 4}}, id="warpgroup-products"),
        pytest.param({"kernel": "_projection_kernel", "arch": 80, "matrix": {"HMMA": 4}}, id="warp-products-on-sm_80"),
        pytest.param({"kernel": "_expected_scores_kernel", "loads": {4: 2}}, id="narrow-loads-with-a-reason"),
    ],
)
def test_what_is_within_the_budget(changes: dict[str, Any]) -> None:
    assert report(**changes).objections == []


def test_cases_are_named_after_ops_and_meet_every_kernel() -> None:
    """Every jitted kernel that host code can launch is met by some case, so that none escapes the budget."""
    assert {name.split("/")[0] for name in aot_cases.CASES} == set(OPS)
    launched: dict[str, set[str]] = {op: set() for op in OPS}
    for name, case in aot_cases.CASES.items():
        with record(TARGETS[90]) as launches:
            case()
        launched[name.split("/")[0]] |= {launch.kernel.__name__ for launch in launches}
    for op, module in OPS.items():
        defined = {name for name in vars(module) if name.endswith("_kernel")}
        assert defined <= launched[op], f"{op}: {defined - launched[op]}"


def test_the_interpreter_and_the_compiler_exclude_each_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="2"):
        aot.main(["--arch", "90"])
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_a_report_is_kept_for_its_key_and_read_by_all_processes(tmp_path: Path) -> None:
    def made(number: int) -> dict[str, Any]:
        return {"registers": number}

    folder = tmp_path / "not" / "there" / "yet"
    with ThreadPoolExecutor(8) as pool:  # that of one of them, whole
        found = list(pool.map(lambda n: aot._kept(folder, "key", lambda: made(n))["registers"], range(8)))
    assert set(found) <= set(range(8))
    kept = aot._kept(folder, "key", lambda: made(9))["registers"]
    assert kept in range(8)
    assert aot._kept(folder, "another key", lambda: made(9))["registers"] == 9
    assert aot._kept(None, "key", lambda: made(9))["registers"] == 9
    assert {path.suffix for path in folder.iterdir()} == {".json"}


def test_a_compilation_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> dict[str, Any]:
        raise RuntimeError("out of registers")

    with pytest.raises(RuntimeError, match="out of registers"):
        aot._kept(tmp_path, "key", fail)
    assert list(tmp_path.iterdir()) == []


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
