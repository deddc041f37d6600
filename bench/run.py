"""Checks a case against the specification, then times its variants in turns: what `gpu`, `cpu` and `compare` share."""

import platform
import re
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

import condense_core
from bench import measure
from bench.case import OURS, Case, Setting
from bench.goal import Goal, judged
from bench.measure import Ceilings, Timing
from condense_core.profiling.processor import processor


def run(case: Case, setting: Setting, ceilings: Ceilings, layer_us: float | None, seconds: float) -> dict[str, Any]:
    """Check one case, time it for about `seconds` a variant, and judge its goals.

    Args:
        case: the op at a shape, made for `setting`.
        setting: device and dtype.
        ceilings: of the machine.
        layer_us: a layer's prefill in microseconds, for goals of the kind "layer"; None leaves them open.
        seconds: time for each variant.

    Returns:
        What `bench/results` keeps of it. Speed-ups and goals are there only if the result was right.
    """
    device = setting.device
    inputs = [case.inputs(0)]
    size = sum(t.nbytes for t in inputs[0])
    inputs += [case.inputs(1_000 * i) for i in range(1, measure.copies(size, device))]
    expected = case.expected(*inputs[0])
    error = relative_error(case.result(case.variants[OURS](*inputs[0])), expected)
    limit = case.limit(setting.dtype)
    correct = error <= limit
    calls = {name: [_bind(variant, tensors) for tensors in inputs] for name, variant in case.variants.items()}
    times = measure.interleaved(calls, device, seconds=seconds)
    floor_us = 1e6 * max(case.bytes / ceilings.copy_bytes_per_s, case.flops / ceilings.matmul_flop_per_s)
    temporaries = measure.temporaries(calls[OURS][0], device)
    ours_us = times[OURS].median_us
    reached = {
        "bandwidth": case.bytes / (ours_us * 1e-6) / ceilings.copy_bytes_per_s,
        "us": ours_us,
        "temporaries": None if temporaries is None else temporaries / 2**20,
        "layer": None if layer_us is None else ours_us / layer_us,
    }
    goals = case.goals.get(device.type, ())
    return {
        "name": case.name,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "shape": case.shape,
        "bytes": case.bytes,
        "flops": case.flops,
        "relative_error": error,
        "tolerance": limit,
        "correct": correct,
        "floor_us": floor_us,
        "temporaries": temporaries,
        "synchronises": measure.synchronises(calls[OURS][0], device),
        **timed(times, goals if correct else (), reached, show=correct),
    }


def timed(
    times: Mapping[str, Timing], goals: tuple[Goal, ...], reached: Mapping[str, float | None], *, show: bool = True
) -> dict[str, Any]:
    """Times, speed-ups over every rival, and judged goals. What something wrong would reach is not shown."""
    speed_ups = {n: t.median_us / times[OURS].median_us for n, t in times.items() if n != OURS} if show else {}
    return {
        "times": {name: asdict(timing) for name, timing in times.items()},
        "speed_ups": speed_ups,
        "goals": judged(goals, speed_ups, reached),
    }


def _bind(variant: Any, tensors: tuple[Tensor, ...]) -> Any:
    return lambda: variant(*tensors)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of the expected values; forced tokens (+inf) must agree exactly."""
    actual, expected = actual.double(), expected.double()
    finite = expected.isfinite()
    if actual.shape != expected.shape or not torch.equal(actual[~finite], expected[~finite]):
        return float("inf")
    difference = torch.linalg.vector_norm(actual[finite] - expected[finite])
    error = float(difference / torch.linalg.vector_norm(expected[finite]).clamp_min(1e-30))
    return error if error == error else float("inf")


def line(result: dict[str, Any]) -> str:
    """A result in one line of the terminal."""
    name, ours = f"{result['name']} {result['dtype']}", result["times"][OURS]
    if not result.get("correct", True):
        return f"{name:42} WRONG: relative error {result['relative_error']:.2e} > {result['tolerance']:.0e}"
    rivals = ", ".join(f"{ratio:.1f}x {rival}" for rival, ratio in result["speed_ups"].items())
    return f"{name:42}{ours['median_us']:12.1f} us; {rivals}"


def machine(device: torch.device) -> dict[str, Any]:
    """Date, device and versions; of a CPU its threads and the instruction set of the kernels, too."""
    facts: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "condense_core": condense_core.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "kvpress": _version("kvpress"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            **facts,
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    from condense_core.ops import native

    isa = None if native.missing() else native.extension().cpu.instruction_set()
    return {**facts, "device": processor(), "threads": torch.get_num_threads(), "instruction_set": isa}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def stem(device_name: str) -> str:
    """A file name made of a device's: `amd-epyc-9554` of `AMD EPYC 9554 64-Core Processor`."""
    name = re.sub(r"\b\d+-core processor\b|\(r\)|\(tm\)", "", device_name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")
