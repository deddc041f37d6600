"""Launching kernels: for which GPU, in which configuration, or only writing the launch down.

Host code of a kernel allocates its outputs and calls `launch`, the one description of a launch that there is. On a GPU
the kernel runs. In Triton's interpreter it runs on CPU tensors. Inside `record(target)` nothing runs: the same host
code, given meta tensors, yields the list of its launches for that target, which `aot.py` compiles. So what is compiled
and checked without a GPU is what runs on one.

Tests: tests/kernels/test_launch.py.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

TRITON_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when triton was imported), and so on CPU tensors."""


@dataclass(frozen=True)
class Target:
    """A kind of GPU, as far as tiling depends on it.

    Attributes:
        arch: compute capability times ten, 90 for 9.0.
        num_sms: streaming multiprocessors.
        shared_memory: bytes that one block may use.
    """

    arch: int
    num_sms: int
    shared_memory: int


TARGETS = {
    80: Target(80, 108, 166_912),  # A100
    86: Target(86, 84, 101_376),  # RTX 3090, A40
    89: Target(89, 128, 101_376),  # RTX 4090, L40
    90: Target(90, 132, 232_448),  # H100, H200
    100: Target(100, 148, 232_448),  # B200
    120: Target(120, 170, 101_376),  # RTX 5090
}
"""What `aot.py` compiles for, each as its best-known card has it."""

OPTIONS = {"enable_fp_fusion": True}
"""Compiler options of every kernel. Triton 3.9 warns where this is left to its default, which is to change."""

# A few multiprocessors, so that loops of persistent kernels go round more than once on small inputs.
_INTERPRETER = Target(90, 3, TARGETS[90].shared_memory)


@dataclass(frozen=True)
class Launch:
    """One kernel launch: what `launch` was called with and the configuration chosen."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constexprs: Mapping[str, Any]
    config: triton.Config


_recorder: ContextVar[tuple[Target, list[Launch]] | None] = ContextVar("condense_core.kernels.launch", default=None)


@contextmanager
def record(target: Target) -> Iterator[list[Launch]]:
    """Within the context nothing runs: launches are appended to the list, chosen as for `target`."""
    launches: list[Launch] = []
    token = _recorder.set((target, launches))
    try:
        yield launches
    finally:
        _recorder.reset(token)


def target_of(device: torch.device) -> Target:
    """The target that kernels for tensors on `device` are tiled for."""
    recording = _recorder.get()
    if recording is not None:
        return recording[0]
    if device.type != "cuda":
        return _INTERPRETER
    index = torch.cuda.current_device() if device.index is None else device.index
    return _cuda_target(index)


@lru_cache
def _cuda_target(index: int) -> Target:
    major, minor = torch.cuda.get_device_capability(index)
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    return Target(10 * major + minor, properties["multiprocessor_count"], properties["max_shared_mem"])


def fitting(
    configs: Sequence[triton.Config], target: Target, shared_memory: Callable[[triton.Config], int]
) -> list[triton.Config]:
    """The configurations whose estimated shared memory fits `target`, in order; the smallest one if none does."""
    fit = [config for config in configs if shared_memory(config) <= target.shared_memory]
    return fit or [min(configs, key=shared_memory)]


def launch(
    kernel: Any,
    grid: Sequence[int] | Callable[[Mapping[str, Any]], Sequence[int]],
    *args: Any,
    configs: Sequence[triton.Config],
    key: Sequence[str] = (),
    **constexprs: Any,
) -> None:
    """Run `kernel[grid](*args, **constexprs)` under one of `configs`.

    On a GPU the fastest configuration is found by Triton's autotuner, once per `key`, which keeps the timings on disk.
    The first one is taken without timing where it is the only one, in the interpreter, in a recording, and while a CUDA
    graph is captured.

    Args:
        kernel: a `triton.jit` function.
        grid: its size, or a function of the constexprs, those of the configuration included. An empty grid runs
            nothing.
        args: the runtime arguments in the kernel's order: tensors, numbers, or None for an absent tensor.
        configs: the configurations to choose from, the most likely first.
        key: names of arguments whose values the choice depends on, besides the dtypes.
        constexprs: the compile-time arguments that no configuration gives.
    """
    recording = _recorder.get()
    config = configs[0]
    options = {**constexprs, **config.kwargs}
    size = tuple(grid(options) if callable(grid) else grid)
    if 0 in size:
        return
    if recording is not None:
        recording[1].append(Launch(kernel, size, args, options, config))
    elif INTERPRETED:
        kernel[size](*args, **options)
    else:
        with _on_device_of(args):
            if len(configs) > 1 and not torch.cuda.is_current_stream_capturing():
                _autotuner(kernel, tuple(configs), tuple(key))[grid](*args, **constexprs, **OPTIONS)
            else:
                warps = {"num_warps": config.num_warps, "num_stages": config.num_stages}
                kernel[size](*args, **options, **warps, **OPTIONS)


@cache
def _autotuner(kernel: Any, configs: tuple[triton.Config, ...], key: tuple[str, ...]) -> Any:
    return triton.autotune(configs=list(configs), key=list(key), cache_results=True)(kernel)


def _on_device_of(args: Sequence[Any]) -> AbstractContextManager[Any]:
    """Triton launches on the current device; make that the one that the tensors are on."""
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    return nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)
