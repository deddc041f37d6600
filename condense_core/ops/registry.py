"""Which backend runs an op: a table of op x backend, asked anew for every call.

A backend is one entry: its function, whether it can run on this machine, and whether it supports a
given call. The first backend in `BACKENDS` with no objection runs; `reference` never objects, so a call
always has an answer and a kernel that is missing or unfit is never replaced by a wrong one.

The environment variable `CONDENSE_BACKEND` names one backend to use for every op instead. Where that one is
missing or unfit, `reference` runs and a warning says why, once per op and reason. A name that does not exist
is an error.
"""

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from condense_core.ops import native
from condense_core.ops.reference import cache_scores, compaction, gradients, query_scores, ragged_decode, selection
from condense_core.ops.reference.expected_attention import expected_attention, query_moments

logger = logging.getLogger(__name__)

BACKENDS = ("cuda", "triton", "cpu", "reference")
"""Every backend name, most preferred first."""

ENVIRONMENT_VARIABLE = "CONDENSE_BACKEND"
_KNOWN = f"one of {', '.join(BACKENDS)}"


def _no_objection(*args: Any, **kwargs: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of one op.

    Attributes:
        op: name of the op, as in `condense_core.ops`.
        name: one of `BACKENDS`.
        run: takes the arguments of the registered op in the order of its schema, already checked; imports what is
            optional when called.
        available: why this machine can never run it (a package, a driver or a device is missing), or None.
        supports: asked with the arguments of a call: why it cannot take them (device, dtype, shape), or None.
    """

    op: str
    name: str
    run: Callable[..., Any]
    available: Callable[[], str | None] = _no_objection
    supports: Callable[..., str | None] = _no_objection


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
            ValueError: a name outside `BACKENDS`, two entries for one op and name, or an op without a
            reference.
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

    @property
    def ops(self) -> tuple[str, ...]:
        """Names of the registered ops, in the order of registration."""
        return tuple(self._table)

    def resolve(self, op: str, *args: Any, **kwargs: Any) -> Backend:
        """Choose the backend for `op(*args, **kwargs)`.

        Raises:
            ValueError: `op` is not registered, or `CONDENSE_BACKEND` names no backend.
        """
        if op not in self._table:
            raise ValueError(f"unknown op {op!r}, known are {', '.join(self._table)}")
        row = self._table[op]
        requested = requested_backend()
        candidates = [name for name in BACKENDS if name in row] if requested is None else [requested]
        for name in candidates:
            if name == "reference":
                break
            reason = self._objection(op, name)
            if reason is None:
                reason = row[name].supports(*args, **kwargs)
            if reason is None:
                return row[name]
            # That a backend asked for by name does not run is news; in the ordinary search it is a detail.
            level = logging.INFO if requested is None else logging.WARNING
            self._report_once(level, op, name, reason)
        return row["reference"]

    def call(self, op: str, *args: Any, **kwargs: Any) -> Any:
        """Run `op` on the backend that `resolve` chooses."""
        return self.resolve(op, *args, **kwargs).run(*args, **kwargs)

    def table(self) -> list[BackendStatus]:
        """Every op with every backend name, most preferred first, and why one is missing."""
        reasons = [(op, name, self._objection(op, name)) for op in self._table for name in BACKENDS]
        return [BackendStatus(op, name, reason is None, reason) for op, name, reason in reasons]

    def _objection(self, op: str, name: str) -> str | None:
        """Why `name` cannot run `op` on this machine, whatever the arguments."""
        backend = self._table[op].get(name)
        if backend is None:
            return no_implementation(op, name)
        return backend.available()

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


def _triton(op: str, module: str, function: str = "forward", *, skip: int = 0) -> Backend:
    """The Triton backend of an op: `condense_core.kernels.{module}.{function}`, loaded when it is first wanted.

    Args:
        skip: leading arguments that the module's `unsupported`, which says why it cannot take a call, does not want.
    """

    @cache
    def load() -> Any:
        return import_module(f"condense_core.kernels.{module}")

    def run(*args: Any) -> Any:
        return getattr(load(), function)(*args)

    def supports(*args: Any) -> str | None:
        device = args[0].device
        if device.type != "cuda" and not _interpreter_requested():
            return f"the tensors are on {device}, Triton needs a CUDA device"
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            return "Triton kernels need compute capability 8.0 or higher"
        reason: str | None = load().unsupported(*args[skip:])
        return reason

    return Backend(op, "triton", run, available=_triton_missing, supports=supports)


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


def _cpu(op: str, module: str) -> Backend:
    """The compiled CPU backend of an op: `condense_core.ops.cpu.{module}.{op}`, loaded when it is first wanted."""

    @cache
    def load() -> Any:
        return getattr(import_module(f"condense_core.ops.cpu.{module}"), op)

    def run(*args: Any) -> Any:
        return load()(*args)

    def supports(*args: Any) -> str | None:
        tensor = _first_tensor(args)
        if tensor.device.type != "cpu":
            return f"the tensors are on {tensor.device}"
        if tensor.dtype not in _COMPILED_DTYPES:
            return f"the tensors are {tensor.dtype}"
        return None

    return Backend(op, "cpu", run, available=native.missing, supports=supports)


def _cuda(op: str, module: str, *, unmeasured: bool = False) -> Backend:
    """The compiled CUDA backend of an op: `condense_core.ops.cuda.{module}.{op}`, loaded when it is wanted.

    Args:
        unmeasured: Triton has the op too, and no GPU has shown this one to be faster: it runs when it is asked for.
    """

    @cache
    def load() -> Any:
        return import_module(f"condense_core.ops.cuda.{module}")

    def run(*args: Any) -> Any:
        return getattr(load(), op)(*args)

    def supports(*args: Any) -> str | None:
        tensor = _first_tensor(args)
        if tensor.device.type != "cuda":
            return f"the tensors are on {tensor.device}"
        if torch.cuda.get_device_capability(tensor.device) < (8, 0):
            return "CUDA kernels need compute capability 8.0 or higher"
        if tensor.dtype not in _COMPILED_DTYPES:
            return f"the tensors are {tensor.dtype}"
        if unmeasured and requested_backend() != "cuda":
            return f"no GPU has shown it to be faster than Triton's; {ENVIRONMENT_VARIABLE}=cuda runs it"
        reason: str | None = load().unsupported(*args) if hasattr(load(), "unsupported") else None
        return reason

    return Backend(op, "cuda", run, available=_cuda_missing, supports=supports)


def _cuda_missing() -> str | None:
    if reason := native.missing():
        return reason
    if not native.extension().has_cuda:
        return "the extension was built without CUDA"
    return None if torch.cuda.is_available() else "no CUDA device is available"


_COMPILED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _first_tensor(args: tuple[Any, ...]) -> torch.Tensor:
    """The first argument, or the first of the list that it is."""
    return args[0] if isinstance(args[0], torch.Tensor) else args[0][0]


REGISTRY = Registry(
    [
        Backend("attention_pool", "reference", gradients.attention_pool),
        Backend("attention_pool_backward", "reference", gradients.attention_pool_backward),
        Backend("cross_pool", "reference", gradients.cross_pool),
        Backend("cross_pool_backward", "reference", gradients.cross_pool_backward),
        _triton("attention_pool", "attention_pool"),
        _cpu("attention_pool", "pooling"),
        _cpu("attention_pool_backward", "pooling"),
        _cuda("attention_pool", "pooling", unmeasured=True),
        _triton("attention_pool_backward", "attention_pool_backward", "backward"),
        _triton("cross_pool", "cross_pool"),
        _cpu("cross_pool", "pooling"),
        _triton("cross_pool_backward", "cross_pool_backward", "backward"),
        Backend("select", "reference", selection.select),
        _cpu("select", "selection"),
        Backend("compact", "reference", compaction.compact),
        _cpu("compact", "compaction"),
        Backend("compact_", "reference", compaction.compact_),
        _cpu("compact_", "compaction"),
        Backend("ragged_append", "reference", compaction.ragged_append),
        _cpu("ragged_append", "compaction"),
        _cuda("select", "selection"),
        _cuda("compact", "compaction"),
        _cuda("compact_", "compaction"),
        _cuda("ragged_append", "compaction"),
        Backend("ragged_decode_attention", "reference", ragged_decode.ragged_decode_attention),
        _triton("ragged_decode_attention", "ragged_decode_attention"),
        _cpu("ragged_decode_attention", "ragged_decode"),
        Backend("query_moments", "reference", query_moments),
        Backend("expected_attention", "reference", expected_attention),
        _triton("query_moments", "query_moments"),
        _triton("expected_attention", "expected_attention"),
        Backend("key_norm", "reference", cache_scores.key_norm),
        Backend("key_similarity", "reference", cache_scores.key_similarity),
        Backend("lag_scores", "reference", cache_scores.lag_scores),
        Backend("value_projection_norm", "reference", cache_scores.value_projection_norm),
        _triton("key_norm", "key_norm"),
        _cpu("key_norm", "cache_scores"),
        _triton("key_similarity", "key_similarity"),
        _cpu("key_similarity", "cache_scores"),
        _triton("lag_scores", "lag_scores"),
        _cpu("lag_scores", "cache_scores"),
        _triton("value_projection_norm", "value_projection_norm"),
        Backend("window_scores", "reference", query_scores.window_scores),
        Backend("non_causal_chunks", "reference", query_scores.non_causal_chunks),
        _triton("window_scores", "window_scores"),
        _cpu("window_scores", "query_scores"),
        _cpu("non_causal_chunks", "query_scores"),
        _cpu("query_moments", "expected_attention"),
        _cpu("expected_attention", "expected_attention"),
        _cpu("value_projection_norm", "cache_scores"),
        _triton("non_causal_chunks", "non_causal_chunks"),
    ]
)
"""The table behind the public ops. A kernel joins by adding its entry here; no caller changes."""


def table() -> list[BackendStatus]:
    """The state of every op and backend on this machine; what `condense doctor` prints."""
    return REGISTRY.table()
