"""A cluster for as long as one process needs it: started or joined, and left as it was found."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from condense_core.decoder.catalog import model_path
from condense_core.decoder.model import load_errors
from condense_core.serving.cluster.deployment import Scale, application
from condense_core.serving.cluster.replica import Report
from condense_core.serving.spec import EngineSpec

APP = "condense"
"""The application that ``deployed`` makes."""
_OBJECT_STORE = 2**30  # bytes of shared memory for texts and answers under way
_FIRST_REPORT = 60.0
_REASON = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception): (.+)$", re.MULTILINE)


@dataclass
class Session:
    """Replicas that answer.

    Attributes:
        handle: a ``DeploymentHandle`` to them.
        first: what one of them reported.
        address: of the cluster, as ``--ray-address`` takes it.
        owns_app, owns_cluster: whether the application, or all of the cluster, ends with this session.
    """

    handle: Any
    first: Report
    address: str
    owns_app: bool
    owns_cluster: bool

    def close(self) -> None:
        """End what this session has started; once is enough."""
        _leave(self.owns_app, self.owns_cluster)
        self.owns_app = self.owns_cluster = False


def deployed(
    spec: EngineSpec,
    *,
    replicas: int | None = None,
    max_replicas: int | None = None,
    stop_seconds: float = 30.0,
    address: str | None = None,
) -> Session:
    """Deploy replicas and wait for them; called by the main thread, which SIGTERM then ends cleanly.

    Args:
        spec: of their engines; device: ``cpu``, ``cuda`` or None.
        replicas: None: one for each GPU, or two where there is none. max_replicas, stop_seconds: as of ``Scale``.
        address: of a cluster, ``HOST:PORT``; None: a new one on this machine (``environment.prepare`` goes before).

    Raises:
        ValueError: there is no such cluster, it has such an application already or too few GPUs, or no replica starts.
    """
    owns_cluster, owns_app = address is None, False
    if spec.device not in (None, "cpu", "cuda"):
        raise ValueError(f"device: got {spec.device!r:.40}, expected cpu or cuda, of which each replica is given one")
    if owns_cluster:  # else this machine need not have the model
        with load_errors(model_path(spec.source)):
            pass
    with _ended_by_sigterm():
        try:
            _connect(address)
            if not owns_cluster and APP in serve.status().applications:
                raise ValueError(
                    f"--ray-address: an application {APP!r} is there already, expected none, or --ray-app {APP}"
                )
            gpus = int(ray.cluster_resources().get("GPU", 0))
            spec, scale = _fitted(spec, replicas, max_replicas, stop_seconds, gpus, owns_cluster)
            serve.start(proxy_location="Disabled", logging_config={"encoding": "JSON", "enable_access_log": False})
            owns_app = True
            handle = serve.run(application(spec, scale), name=APP, route_prefix=None)
            return Session(handle, _first_report(handle), _address(), owns_app, owns_cluster)
        except BaseException as error:
            _leave(owns_app, owns_cluster)
            raise _clear(error) from error


def joined(app: str, *, address: str) -> Session:
    """Use the replicas of an application that ``serve deploy`` has made; ``ValueError`` where it cannot be found."""
    with _ended_by_sigterm():
        try:
            _connect(address)
            if app not in (known := serve.status().applications):
                raise ValueError(
                    f"--ray-app: got {app!r:.60}, expected one of {', '.join(known) or 'which there is none'}"
                )
            handle = serve.get_app_handle(app)
            return Session(handle, _first_report(handle), _address(), False, False)
        except BaseException as error:
            _leave(False, False)
            raise _clear(error) from error


def _fitted(
    spec: EngineSpec, replicas: int | None, max_replicas: int | None, stop_seconds: float, gpus: int, one_machine: bool
) -> tuple[EngineSpec, Scale]:
    """The spec and the scale for a cluster of so many GPUs."""
    on_gpu = gpus > 0 if spec.device is None else spec.device == "cuda"
    replicas = replicas or (max(gpus, 1) if on_gpu else 2)
    scale = Scale(replicas=replicas, max_replicas=max_replicas, num_gpus=float(on_gpu), stop_seconds=stop_seconds)
    if not one_machine:
        return spec, replace(scale, num_cpus=float(spec.threads or 1))
    if on_gpu and scale.most > gpus:
        raise ValueError(f"replicas: got {scale.most}, expected at most one for each of {gpus} GPUs, or --device cpu")
    if not on_gpu and spec.threads is None:
        spec = replace(spec, threads=max(len(os.sched_getaffinity(0)) // scale.most, 1))
    return spec, replace(scale, num_cpus=0.0)  # there is no other machine to place it on


def _connect(address: str | None) -> None:
    """Join a cluster, or start one."""
    if address is None:
        where: dict[str, Any] = {"address": "local", "include_dashboard": False, "object_store_memory": _OBJECT_STORE}
    elif "://" in address:
        raise ValueError(f"--ray-address: got {address!r:.80}, expected HOST:PORT, from a machine of that cluster")
    else:
        where = {"address": address}
    ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
    _set_sigterm(_terminated)  # ray.init has put a handler of its own there
    logger = logging.getLogger("ray.serve")
    logger.handlers.clear()
    logger.propagate = True  # to the server's log
    logger.setLevel(logging.ERROR)  # what it warns of is in RayService's warnings, and in Ray's own logs


def _first_report(handle: Any) -> Report:
    report: Report = handle.report.remote().result(timeout_s=_FIRST_REPORT)
    return report


def _address() -> str:
    return str(ray.get_runtime_context().gcs_address)


def _leave(owns_app: bool, owns_cluster: bool) -> None:
    """End what this process has started, and its connection; whatever of it is gone already is no error."""
    if not ray.is_initialized():
        return
    with suppress(Exception):
        if owns_cluster:
            serve.shutdown()
        elif owns_app:
            serve.delete(APP)
    ray.shutdown(wait_for_processes=True)


def _clear(error: BaseException) -> BaseException:
    """``error``, as one line where it is Ray's way to say that something else went wrong."""
    if not isinstance(error, RayError | RayServeException | RuntimeError | ConnectionError | TimeoutError):
        return error
    found = _REASON.findall(str(error)) or [" ".join(str(error).split()) or type(error).__name__]
    return ValueError(f"ray: no engine could be started ({found[-1][:500]})")


# -- signals -----------------------------------------------------------------------------------------------------------


def _terminated(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def _set_sigterm(handler: Any) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Within, SIGTERM raises ``SystemExit``; behind it, it does what it did before."""
    before = signal.getsignal(signal.SIGTERM)
    _set_sigterm(_terminated)
    try:
        yield
    finally:
        _set_sigterm(before)
