"""Timing that can be believed: variants take turns, inputs are cold, and one number is a median with its spread.

On a GPU the calls of a variant, one for each of several copies of the inputs, are captured into a CUDA graph: that
leaves launch gaps out, and by the time a copy comes round again it has left the L2 cache. The graphs are replayed A B A
B. What cannot be captured, because it waits for the device, is timed as it is, and the result says so. On a CPU the
same turns are taken with the wall clock.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from condense_core.ops import native

Calls = Sequence[Callable[[], Any]]
"""One call for each copy of the inputs."""


@dataclass(frozen=True)
class Timing:
    """Microseconds per call over all rounds, and how they were taken: "graph", "stream" or "clock"."""

    median_us: float
    low_us: float
    high_us: float
    rounds: int
    how: str


def interleaved(variants: Mapping[str, Calls], device: torch.device, *, seconds: float = 1.0) -> dict[str, Timing]:
    """Time every variant in turns until each had about `seconds`, at least 5 and at most 200 rounds."""
    runners = {name: _runner(calls, device) for name, calls in variants.items()}
    samples: dict[str, list[float]] = {name: [] for name in runners}
    first = {name: run() for name, (run, _) in runners.items()}  # a warm turn, which also says how many are affordable
    rounds = max(5, min(200, int(seconds / max(1e-6, statistics.mean(first.values()) * 1e-6))))
    for _ in range(rounds):
        for name, (run, _) in runners.items():
            samples[name].append(run() / len(variants[name]))
    return {name: _summary(values, runners[name][1]) for name, values in samples.items()}


def _summary(values: list[float], how: str) -> Timing:
    ordered = sorted(values)
    tenth = len(ordered) // 10
    return Timing(statistics.median(ordered), ordered[tenth], ordered[-1 - tenth], len(ordered), how)


def _runner(calls: Calls, device: torch.device) -> tuple[Callable[[], float], str]:
    """A function that makes all calls once and returns the microseconds they took together."""
    for call in calls:
        for _ in range(2):
            call()  # compiles, tunes, fills caches
    if device.type != "cuda":
        return lambda: _clocked(calls), "clock"
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError:
        torch.cuda.synchronize(device)
        return lambda: _between_events(lambda: [call() for call in calls]), "stream"
    return lambda: _between_events(graph.replay), "graph"


def _between_events(run: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)


def _clocked(calls: Calls) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return 1e6 * (time.perf_counter() - start)


def copies(bytes_per_input: int, device: torch.device) -> int:
    """How many copies of the inputs make each one cold when it comes round again: three times the L2 cache."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(64, -(-3 * cache // max(1, bytes_per_input))))


def temporaries(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that a call holds at its peak beyond what was there before and what it returns.

    On a CPU: torch's tensors as its profiler sees them, plus the scratch memory of the compiled kernels.
    """
    call()
    if device.type != "cuda":
        return _cpu_temporaries(call)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = call()
    torch.cuda.synchronize(device)
    peak, after = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
    del kept
    return peak - max(before, after)


def _cpu_temporaries(call: Callable[[], Any]) -> int:
    scratch = None if native.missing() else native.extension().cpu.scratch_peak
    if scratch:
        scratch(reset=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = call()
    changes = [event.cpu_memory_usage for event in _by_time(profile) if event.name == "[memory]"]
    held = list(itertools.accumulate(changes, initial=0))
    del kept
    return max(held) - held[-1] + (scratch() if scratch else 0)


def _by_time(profile: Any) -> list[Any]:
    return sorted(profile.events(), key=lambda event: event.time_range.start)


def synchronises(call: Callable[[], Any], device: torch.device) -> bool | None:
    """Whether a call makes the host wait for the device; None on a CPU."""
    if device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches on the two things kernels are limited by."""

    copy_bytes_per_s: float  # of a large copy, read and written bytes counted
    matmul_flop_per_s: float  # of a large product of random matrices


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure both on random data, the product in `dtype`."""
    size = 1 << (31 if device.type == "cuda" else 26)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = interleaved({"copy": [lambda: target.copy_(source)], "matmul": [lambda: a @ b]}, device, seconds=0.3)
    return Ceilings(2e6 * size / times["copy"].median_us, 2e6 * n**3 / times["matmul"].median_us)
