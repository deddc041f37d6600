"""The GPU's benchmark program, gone through on the CPU: what it checks, what it refuses to print, what it writes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench():
    """The modules of `bench/`, which is no installed package."""
    sys.path.insert(0, str(CHECKOUT))
    try:
        from bench import case, cases, goal, gpu, measure, run

        yield SimpleNamespace(case=case, cases=cases, gpu=gpu, goal=goal, measure=measure, run=run)
    finally:
        sys.path.remove(str(CHECKOUT))


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run in the checkout, without a GPU and without the interpreter that tests of kernels may have asked for."""
    clean = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "CONDENSE_BACKEND")}
    clean |= {"CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(command, cwd=CHECKOUT, env=clean, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_every_case_is_checked_and_written(tmp_path: Path) -> None:
    # TORCH_COMPILE_DISABLE: compiling the baselines takes minutes and is not what is tested.
    done = run(sys.executable, "-m", "bench.gpu", "--smoke", "--out", str(tmp_path), TORCH_COMPILE_DISABLE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "smoke.json").read_text())
    for case in document["cases"]:
        assert case["correct"], case
        assert set(case["times"]) - {"condense_core"} == set(case["speed_ups"])
        assert case["bytes"] > 0
        assert case["floor_us"] > 0
    assert (tmp_path / "smoke.md").read_text().count("\n|") == len(document["cases"]) + 2


def test_every_op_has_a_case_under_its_stem(bench) -> None:
    from condense_core.ops.backends import REGISTRY

    measured_together = {"compact_"} | {op for op in REGISTRY.ops if op.endswith("_backward")}
    assert set(bench.cases.OPS) == set(REGISTRY.ops) - measured_together
    setting = bench.case.Setting(torch.device("cpu"), **bench.gpu.SMOKE | {"packs": (1,), "compiled": False})
    for op in bench.cases.OPS:
        names = {case.name.split()[0] for case in bench.cases.cases(setting, (op,))}
        assert op in names
        assert names <= {op, f"{op}_backward"}


def case(bench, wrong: float = 0.0):
    """A case whose kernel is off by `wrong`."""
    return bench.case.Case(
        "sum n=8",
        "8 numbers",
        bytes=32,
        flops=8,
        inputs=lambda seed: (torch.arange(8.0),),
        variants={"condense_core": lambda x: x + 1 + wrong, "eager": lambda x: x + 1, "eager slow": lambda x: x + 1},
        expected=lambda x: x + 1,
        goals={"cpu": (bench.goal.Goal("speed-up", 1e-9, "eager"), bench.goal.Goal("us", 1e-9))},
    )


def result(bench, wrong: float = 0.0):
    ceilings = bench.measure.Ceilings(copy_bytes_per_s=1e9, matmul_flop_per_s=1e9)
    setting = bench.case.Setting(torch.device("cpu"), torch.float32)
    return bench.run.run(case(bench, wrong), setting, ceilings, layer_us=None, seconds=0.001)


def test_goals_are_judged(bench) -> None:
    found = result(bench)
    assert [goal["met"] for goal in found["goals"]] == [True, False]
    slowest = min(found["speed_ups"].values())
    assert found["goals"][0]["reached"] == slowest, "a speed-up counts over the fastest rival of that name"
    assert found["floor_us"] == pytest.approx(32 / 1e9 * 1e6)


def test_a_wrong_kernel_gets_no_speed_up(bench) -> None:
    found = result(bench, wrong=1.0)
    assert not found["correct"]
    assert found["speed_ups"] == {}
    assert found["goals"] == []
    assert "WRONG" in bench.run.line(found)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_misplaced_infinities_are_errors(bench, bad: float) -> None:
    error = bench.run.relative_error
    good = torch.tensor([1.0, float("inf")])
    assert error(good, good) == 0.0
    assert error(torch.tensor([bad, float("inf")]), good) == float("inf")
    assert error(torch.tensor([1.0, 2.0]), good) == float("inf")


def test_variants_take_turns(bench) -> None:
    order: list[str] = []
    calls = {name: [lambda name=name: order.append(name)] for name in "ab"}
    times = bench.measure.interleaved(calls, torch.device("cpu"), seconds=0.0)
    assert times["a"].rounds == times["b"].rounds == 5
    assert "".join(order).endswith("ab" * 5)


def test_every_op_of_the_sanitizer_run_works() -> None:
    done = run(sys.executable, "-m", "bench.sanitize")
    assert done.stdout == "every op ran on cpu\n", done.stderr


def test_make_gpu_says_what_is_missing() -> None:
    done = run("bash", "bench/gpu.sh")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no python with a torch that sees a CUDA device")


def test_the_package_of_links_is_whole(tmp_path: Path) -> None:
    """`make gpu` runs without an installation: its links must give every subpackage and the embedded model."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in ("condense_core", "kernels", "models", "bench"):
        (copy / name).symlink_to(CHECKOUT / name)
    script = (CHECKOUT / "bench/gpu.sh").read_text()
    function = script[script.index("link_package() {") : script.index("python=$(find_python)")]
    assert shutil.which("bash")
    subprocess.run(["bash", "-euc", function + "link_package"], cwd=copy, check=True, timeout=60)
    code = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import condense_core, condense_core.kernels, condense_core.ops, bench.cases
from condense_core.decoder.embedded import embedded_model_path
print(condense_core.kernels.__file__, embedded_model_path())
"""
    linked = str(copy / "build/gpu")
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": linked}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(linked)
