"""Which backend runs an op: the mechanism. The table of all ops and backends is `condense_core.ops.backends`.

A backend is one entry: its function, whether it can run on this machine, and whether it supports a given call, which
comes as a record of `condense_core.ops.arguments`. The first backend in `BACKENDS` with no objection runs; `reference`
never objects, so a call always has an answer.

The environment variable `CONDENSE_BACKEND` names one backend to use for every op instead. Where that one is missing or
unfit, `reference` runs and a warning says why, once per op and reason. A name that does not exist is an error.
"""

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from condense_core.ops import native

logger = logging.getLogger(__name__)

BACKENDS = ("cuda", "triton", "cpu", "reference")
"""Every backend name, most preferred first."""

ENVIRONMENT_VARIABLE = "CONDENSE_BACKEND"
_KNOWN = f"one of {', '.join(BACKENDS)}"


def _available() -> str | None:
    return None


def _supported(arguments: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of one op.

    Attributes:
        op: name of the op, as in `condense_core.ops`.
        name: one of `BACKENDS`.
        run: takes the op's record of arguments, already checked; imports what is optional when called.
        available: why this machine can never run it (a package, a driver or a device is missing), or None.
        supports: asked with the record of a call: why it cannot take it (device, dtype, shape), or None.
    """

    op: str
    name: str
    run: Callable[[Any], Any]
    available: Callable[[], str | None] = _available
    supports: Callable[[Any], str | None] = _supported

    def objection(self, arguments: Any) -> str | None:
        """Why it cannot take a call on this machine, or None."""
        return self.available() or self.supports(arguments)


@dataclass(frozen=True)
class BackendStatus:
    """One row of `table()`: whether `backend` can run `op` on this machine, and if not, the reason."""

    op: str
    backend: str
    available: bool
    why_not: str | None


class Registry:
    """A table of backends, at most one per op and backend name, each op with a `reference`."""

    def __init__(self, backends: Iterable[Backend]) -> None:
        """Fill the table.

        Raises:
            ValueError: a name outside `BACKENDS`, two entries for one op and name, or an op without a reference.
        """
        self._table: dict[str, dict[str, Backend]] = {}
        self._reported: set[tuple[str, str, str]] = set()
        for backend in backends:
            if backend.name not in BACKENDS:
                raise ValueError(f"op {backend.op!r}: backend {backend.name!r} is not {_KNOWN}")
            row = self._table.setdefault(backend.op, {})
            if backend.name in row:
                raise ValueError(f"op {backend.op!r}: backend {backend.name!r} is registered twice")
            row[backend.name] = backend
        for op, row in self._table.items():
            if "reference" not in row:
                raise ValueError(f"op {op!r} has no reference backend")
            self._table[op] = {name: row[name] for name in BACKENDS if name in row}

    @property
    def ops(self) -> tuple[str, ...]:
        """Names of the registered ops, in the order of registration."""
        return tuple(self._table)

    def backends(self, op: str) -> tuple[str, ...]:
        """Names of the backends that `op` has, whether or not they run on this machine, most preferred first."""
        return tuple(self._table[op])

    def resolve(self, op: str, arguments: Any) -> Backend:
        """Choose the backend for a call of `op` with a record of arguments.

        Raises:
            ValueError: `op` is not registered, or `CONDENSE_BACKEND` names no backend.
        """
        row = self._table.get(op)
        if row is None:
            raise ValueError(f"unknown op {op!r}, known are {', '.join(self._table)}")
        requested = requested_backend()
        if requested is not None:
            reason = row[requested].objection(arguments) if requested in row else no_implementation(op, requested)
            if reason is None:
                return row[requested]
            self._report_once(logging.WARNING, op, requested, reason)
            return row["reference"]
        for name, backend in row.items():
            reason = backend.objection(arguments)
            if reason is None:
                return backend
            self._report_once(logging.INFO, op, name, reason)  # in the ordinary search it is a detail
        return row["reference"]

    def call(self, op: str, arguments: Any) -> Any:
        """Run `op` on the backend that `resolve` chooses."""
        return self.resolve(op, arguments).run(arguments)

    def table(self) -> list[BackendStatus]:
        """Every op with every backend name, most preferred first, and why one is missing."""
        rows = []
        for op, row in self._table.items():
            for name in BACKENDS:
                reason = row[name].available() if name in row else no_implementation(op, name)
                rows.append(BackendStatus(op, name, reason is None, reason))
        return rows

    def _report_once(self, level: int, op: str, name: str, reason: str) -> None:
        key = (op, name, reason)
        if key not in self._reported:
            self._reported.add(key)
            logger.log(level, "%s: backend %s is not used: %s", op, name, reason)


def no_implementation(op: str, name: str) -> str:
    """The reason given where nobody wrote `op` for the backend `name`."""
    return f"this version has no {name} implementation of {op}"


def requested_backend() -> str | None:
    """The backend that `CONDENSE_BACKEND` asks for, or None when it is unset or empty.

    Raises:
        ValueError: it names no backend.
    """
    requested = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if not requested:
        return None
    if requested not in BACKENDS:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={requested!r} is no backend, expected {_KNOWN}")
    return requested


def reference(op: str, *, module: str | None = None, function: str | None = None) -> Backend:
    """The reference backend of an op: `condense_core.ops.reference.{module}.{function}`, both named as the op.

    Its parameters have the names of the record's fields.
    """
    load = _loader(f"condense_core.ops.reference.{module or op}", function or op)
    return Backend(op, "reference", lambda arguments: load()(**arguments._asdict()))


def triton(op: str, *, function: str = "forward") -> Backend:
    """The Triton backend of an op: `condense_core.kernels.{op}.{function}`."""
    load = _loader(f"condense_core.kernels.{op}", function)
    load_unsupported = _loader(f"condense_core.kernels.{op}", "unsupported")

    def run(arguments: Any) -> Any:
        return load()(arguments)

    def supports(arguments: Any) -> str | None:
        device = arguments[0].device
        if device.type != "cuda" and not _interpreter_requested():
            return f"the tensors are on {device}, Triton needs a CUDA device"
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            return "Triton kernels need compute capability 8.0 or higher"
        reason: str | None = load_unsupported()(arguments)
        return reason

    return Backend(op, "triton", run, available=_triton_missing, supports=supports)


def cpu(op: str, *, module: str | None = None) -> Backend:
    """The compiled CPU backend of an op: `condense_core.ops.cpu.{module}.{op}`, the module named as the op."""
    load = _loader(f"condense_core.ops.cpu.{module or op}", op)

    def supports(arguments: Any) -> str | None:
        tensor = _first_tensor(arguments)
        if tensor.device.type != "cpu":
            return f"the tensors are on {tensor.device}"
        if tensor.dtype not in _COMPILED_DTYPES:
            return f"the tensors are {tensor.dtype}"
        return None

    return Backend(op, "cpu", lambda arguments: load()(arguments), available=native.missing, supports=supports)


def cuda(op: str, *, module: str | None = None, unmeasured: bool = False) -> Backend:
    """The compiled CUDA backend of an op: `condense_core.ops.cuda.{module}.{op}`, the module named as the op.

    Args:
        op: its name, and that of the function.
        module: the module's name if it is another; its `unsupported`, if it has one, says why it cannot take a call.
        unmeasured: Triton has the op too, and no GPU has shown this one to be faster: it runs when it is asked for.
    """
    path = f"condense_core.ops.cuda.{module or op}"
    load, load_unsupported = _loader(path, op), _loader(path, "unsupported", _supported)

    def supports(arguments: Any) -> str | None:
        tensor = _first_tensor(arguments)
        if tensor.device.type != "cuda":
            return f"the tensors are on {tensor.device}"
        if torch.cuda.get_device_capability(tensor.device) < (8, 0):
            return "CUDA kernels need compute capability 8.0 or higher"
        if tensor.dtype not in _COMPILED_DTYPES:
            return f"the tensors are {tensor.dtype}"
        if unmeasured and requested_backend() != "cuda":
            return f"no GPU has shown it to be faster than Triton's; {ENVIRONMENT_VARIABLE}=cuda runs it"
        reason: str | None = load_unsupported()(arguments)
        return reason

    return Backend(op, "cuda", lambda arguments: load()(arguments), available=_cuda_missing, supports=supports)


def _loader(module: str, name: str, default: Callable[..., Any] | None = None) -> Callable[[], Callable[..., Any]]:
    """How to get a module's function, or the default if it has none; the module is imported with the first call."""
    load = cache(partial(import_module, module))
    if default is None:
        return lambda: getattr(load(), name)
    return lambda: getattr(load(), name, default)


@cache
def _installed(package: str) -> bool:
    return find_spec(package) is not None  # a search of the disk


def _triton_missing() -> str | None:
    if not _installed("triton"):
        return "triton is not installed"
    if not torch.cuda.is_available() and not _interpreter_requested():
        return "no CUDA device is available"
    return None


def _interpreter_requested() -> bool:
    """Triton's interpreter takes CPU tensors, a thousand times too slowly for anything but a test that asks for it."""
    return os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get(ENVIRONMENT_VARIABLE) == "triton"


def _cuda_missing() -> str | None:
    if reason := native.missing():
        return reason
    if not native.extension().has_cuda:
        return "the extension was built without CUDA"
    return None if torch.cuda.is_available() else "no CUDA device is available"


_COMPILED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _first_tensor(arguments: Any) -> torch.Tensor:
    """The first argument, or the first of the list that it is."""
    return arguments[0] if isinstance(arguments[0], torch.Tensor) else arguments[0][0]
