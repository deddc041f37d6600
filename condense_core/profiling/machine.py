"""What a machine can do at best, and what memory it has: measured here, so that a share of it means something."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_COPIED = 256 * 2**20  # bytes, beyond any cache


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of ``work``, finished on ``device``."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def _best(work: Callable[[], object], device: torch.device, budget: float) -> float:
    """The shortest of at least three calls, and of as many as ``budget`` seconds allow."""
    work()
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 100):
        times.append(seconds_of(work, device))
    return min(times)


def matmul_peak(device: torch.device, dtype: torch.dtype, *, budget: float = 0.2) -> float:
    """Floating point operations a second of large square matrix products; ``budget`` in seconds."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return float(2 * n**3 / _best(lambda: torch.matmul(a, b, out=out), device, budget))


def copy_bandwidth(device: torch.device, *, budget: float = 0.2) -> float:
    """Bytes a second of a large copy, what is read and what is written counted both."""
    source = torch.zeros(_COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return float(2 * _COPIED / _best(lambda: target.copy_(source), device, budget))


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on ``device``; None where that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    found = []
    with contextlib.suppress(OSError, TypeError):
        found.append(int(re.search(r"MemAvailable:\s+(\d+) kB", _MEMINFO.read_text())[1]) * 1024)  # type: ignore[index]
    with contextlib.suppress(OSError, ValueError):  # "max" is no limit
        used = int((_CGROUP / "memory.current").read_text())
        cached = re.search(r"^inactive_file (\d+)", (_CGROUP / "memory.stat").read_text(), re.MULTILINE)
        used -= int(cached[1]) if cached else 0
        found.append(max(0, int((_CGROUP / "memory.max").read_text()) - used))
    return min(found, default=None)


class PeakMemory:
    """As a context: the most bytes that were allocated inside beyond what was there before.

    On the CPU it is resident memory, whose high-water mark Linux lets a process reset; on a CUDA device what torch has
    allocated.

    Attributes:
        bytes: known behind the context; None where it cannot be measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None
        self._before: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()  # garbage that goes inside would hide as much as it was
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif self.device.type == "cpu":
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)  # what was freed and kept would not show as new
            with contextlib.suppress(OSError):
                _CLEAR.write_text("5")
                self._before = _resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is None:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        else:
            self.bytes = max(0, _resident("VmHWM") - self._before)


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())
    assert found is not None, field
    return int(found[1]) * 1024


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[int]:
    """Inside, torch computes with ``count`` threads on the CPU; None: as many as before. Yields the number."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
