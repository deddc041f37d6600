"""Counters that are zero when a launch starts, for kernels whose programs count each other's arrivals.

A call that zeroed its own counters would launch twice. So they are zeroed once, and every launch leaves them as it
found them.

Tests: tests/kernels/test_counters.py.
"""

import threading

import torch
import triton
from torch import Tensor


def counters(device: torch.device, size: int) -> Tensor:
    """`size` zeros in int32, touched by no launch that may overlap with the caller's, which must leave them zero."""
    if device.type != "cuda":  # a recording on meta tensors, or the interpreter
        return torch.zeros(size, dtype=torch.int32, device=device)
    return _COUNTERS.take(device, size)


class _Counters:
    """Rows of counters. Launches that follow each other may share a row, launches that may overlap must not.

    Those on one stream follow each other: one row per stream serves them all. A captured launch may be replayed on any
    stream, beside anything but itself (the launches of one graph wait for each other): it gets a row that nothing else
    will ever use, about 1 KB. Zeroing a row inside the capture instead would add a node to the graph for every layer.

    This is state of a module, against the rule of the project, because the zeros must outlive a call. No result depends
    on it.
    """

    _ROWS = 1024

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of_stream: dict[tuple[int, int, int], Tensor] = {}  # by device, size and stream
        self._free: dict[tuple[int, int], list[Tensor]] = {}  # by device and size
        self._tables: list[Tensor] = []  # whose rows these are; graphs know addresses only, so none may be freed

    def take(self, device: torch.device, size: int) -> Tensor:
        """A row for a launch on the current stream of `device`, a CUDA device."""
        index = torch.cuda.current_device() if device.index is None else device.index
        with self._lock, torch.cuda.device(index):
            free = self._free.setdefault((index, size), [])
            if torch.cuda.is_current_stream_capturing():
                # Without a row only the graph can zero one: when nothing ran here before, or not for 500 launches.
                return free.pop() if free else torch.zeros(size, dtype=torch.int32, device="cuda")
            if len(free) <= self._ROWS // 2:
                free.extend(self._zeroed(index, size))
            key = (index, size, torch.cuda.current_stream().cuda_stream)
            if key not in self._of_stream:
                self._of_stream[key] = free.pop()
            return self._of_stream[key]

    def _zeroed(self, index: int, size: int) -> list[Tensor]:
        """New rows, zero when this returns, so that any stream may use them.

        They are allocated in a thread of its own: the caller's allocations may be going to a memory pool (while a CUDA
        graph is warmed up, say), and these outlive it.
        """
        table = []

        def allocate() -> None:
            with torch.cuda.device(index):
                # Rows of whole 16 bytes, for pointers that are aligned alike share one compiled kernel.
                table.append(torch.zeros(self._ROWS, 4 * triton.cdiv(size, 4), dtype=torch.int32, device="cuda"))
                torch.cuda.current_stream().synchronize()

        thread = threading.Thread(target=allocate)
        thread.start()
        thread.join()
        self._tables += table
        return list(table[0])


_COUNTERS = _Counters()
