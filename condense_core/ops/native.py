"""The extension `condense_core._C`: found, checked, and given tensors.

It knows nothing of torch. A tensor goes to it as `(address, dtype code, shape, strides)`; whoever passes one keeps it
alive and has checked it. An extension that is missing, or that another Python or another version of this package built,
is no error: its backends say why they cannot run, and the log says it once.
"""

import ctypes
import logging
import sys
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from condense_core._version import __version__

logger = logging.getLogger(__name__)

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int32: 3, torch.int64: 4}
"""What a dtype is in C++: `Dtype` of csrc/condense/tensor.h."""

View = tuple[int, int, tuple[int, ...], tuple[int, ...]]


def view(tensor: Tensor | None) -> View | None:
    """What the extension takes for a tensor, which must outlive the call; None for None."""
    if tensor is None:
        return None
    return tensor.data_ptr(), DTYPE_CODES[tensor.dtype], tensor.shape, tensor.stride()


def rows_contiguous(tensor: Tensor) -> Tensor:
    """The tensor, copied if its last dimension is not contiguous: kernels read whole rows."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def contiguous_floats(tensor: Tensor | None) -> Tensor | None:
    """The tensor in fp32 and contiguous, None for None: how kernels take queries, weights and other small tensors."""
    return None if tensor is None else tensor.float().contiguous()


def copy_back(buffers: Sequence[Tensor], written: Sequence[Tensor]) -> None:
    """Write into the buffers of a caller what a kernel wrote into their `rows_contiguous`, where these are copies."""
    for buffer, rows in zip(buffers, written, strict=True):
        if rows is not buffer:
            buffer.copy_(rows)


def extension() -> ModuleType:
    """The loaded extension.

    Raises:
        ImportError: `missing()` says why.
    """
    module, reason = load()
    if module is None:
        raise ImportError(reason)
    return module


def missing() -> str | None:
    """Why the extension cannot be used, or None."""
    return load()[1]


@cache
def load() -> tuple[ModuleType | None, str | None]:
    """The extension, or None and why it cannot be used; looked for once, until `load.cache_clear()`."""
    module, reason = None, None
    try:
        module = import_module("condense_core._C")
    except ImportError as error:
        reason = _why_not(error)
        logger.warning("the compiled extension is not used: %s", reason)
    else:
        if module.version != __version__:
            reason = f"the extension was built for condense_core {module.version}, this is {__version__}: install again"
            logger.warning("the compiled extension is not used: %s", reason)
            module = None
    if module is not None:
        module.cpu.share_openmp(_gomp_parallel())
    return module, reason


def _why_not(error: ImportError) -> str:
    folder = Path(__file__).parents[1]
    built = sorted(path.name for path in folder.glob("_C.*") if path.suffix in (".so", ".pyd"))
    fitting = [name for name in built if any(name == f"_C{suffix}" for suffix in EXTENSION_SUFFIXES)]
    python = f"{sys.implementation.name} {sys.version_info.major}.{sys.version_info.minor} on {sys.platform}"
    if fitting:
        return f"{fitting[0]} cannot be loaded: {error}"
    if built:
        return f"{', '.join(built)} is for another Python or platform than this {python}: install again"
    return "this installation has none: it was made without a C++ compiler, or with CONDENSE_EXTENSION=0"


def _gomp_parallel() -> int:
    """The address of `GOMP_parallel` in the OpenMP runtime that torch brought, or 0 where it brought another."""
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        try:
            # Only if torch has loaded it: a second copy of the runtime would have threads of its own.
            loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_LOCAL | getattr(ctypes, "RTLD_NOLOAD", 4))
            return ctypes.cast(loaded.GOMP_parallel, ctypes.c_void_p).value or 0
        except (OSError, AttributeError):
            continue
    return 0


def call(function: str, **arguments: Any) -> None:
    """Run `condense_core._C.cpu.{function}` on tensors, numbers and None, on as many threads as torch uses.

    Args:
        function: name of the kernel in csrc/cpu/table.h.
        arguments: all its parameters but the number of threads, by the names that they have there.
    """
    # A dictionary of its own: arguments keeps tensors alive that exist for this call only.
    views = {name: view(value) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    getattr(extension().cpu, function)(**views, threads=torch.get_num_threads())
