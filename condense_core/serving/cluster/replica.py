"""A replica: an engine in a process of its own, which Ray Serve starts, watches and ends."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar

from prometheus_client import Metric
from ray import serve
from transformers.utils import logging as transformers_logging

from condense_core.serving.engine import CompressionEngine
from condense_core.serving.errors import ERRORS, DeviceFailed, InternalError, ServingError
from condense_core.serving.prometheus import PrometheusObserver
from condense_core.serving.requests import AnswerRequest, CompressRequest, PruneRequest
from condense_core.serving.service import SWITCH_SECONDS, LocalService
from condense_core.serving.spec import EngineSpec
from condense_core.serving.wire import Compressed

T = TypeVar("T")

_log = logging.getLogger(__name__)
_LEAVE_SECONDS = 1.0  # for answers under way, once the device has failed


@dataclass(frozen=True)
class Failure:
    """A ``ServingError`` between processes.

    A value, because an exception that a replica raised would be wrapped, and written into Ray's logs with its trace.
    """

    code: str
    message: str
    retry_after: float | None

    @classmethod
    def of(cls, error: ServingError) -> Failure:
        return cls(error.code, str(error), error.retry_after)

    def error(self) -> ServingError:
        """The error that it was made of."""
        return ERRORS.get(self.code, InternalError)(self.message, retry_after=self.retry_after)


@dataclass(frozen=True)
class Report:
    """What a replica says of itself.

    Attributes:
        replica: its name in the cluster. host, pid: the process.
        facts, load: those of its engine.
        ready: whether it accepts requests.
        figures: for Prometheus.
    """

    replica: str
    host: str
    pid: int
    facts: dict[str, Any]
    load: dict[str, Any]
    ready: bool
    figures: list[Metric]


class EngineReplica:
    """The deployment's class. Its methods answer with a ``Failure`` instead of raising a ``ServingError``."""

    # Ray Serve awaits it, and sends requests once it has returned: behind the warm-up.
    async def __init__(self, spec: EngineSpec) -> None:  # type: ignore[misc]
        sys.setswitchinterval(SWITCH_SECONDS)
        transformers_logging.disable_progress_bar()  # they would fill a log file
        self._name = str(serve.get_replica_context().replica_tag)
        served = spec.load()
        self._observer = PrometheusObserver(served.device)
        self._service = LocalService(CompressionEngine(served, limits=spec.limits, observer=self._observer))
        await self._service.start()

    async def compress(self, request: CompressRequest) -> Compressed | Failure:
        return await _value_of(self._service.compress(request))

    async def answer(self, request: AnswerRequest) -> dict[str, Any] | Failure:
        return await _value_of(self._service.answer(request))

    async def prune(self, request: PruneRequest) -> AsyncIterator[Failure | int | bytes]:
        """The size of the file, and then its bytes; or only a ``Failure``."""
        stream = await _value_of(self._service.prune(request))
        if isinstance(stream, Failure):
            yield stream
            return
        yield stream.nbytes
        async for chunk in stream.chunks:
            yield bytes(chunk)

    async def report(self) -> Report:
        return Report(
            self._name,
            socket.gethostname(),
            os.getpid(),
            self._service.models()[0],
            self._service.load(),
            self._service.is_ready,
            list(self._observer.registry.collect()),
        )

    async def check_health(self) -> None:
        """Ray Serve calls it regularly, and replaces a replica for which it raises."""
        if not self._service.is_healthy:
            raise RuntimeError("the device has failed, or hangs; expected this replica to be replaced")


async def _value_of(work: Awaitable[T]) -> T | Failure:
    try:
        return await work
    except DeviceFailed as error:
        # It would fail all that it is sent at once, and be sent the more for it, until it is found unhealthy.
        asyncio.get_running_loop().call_later(_LEAVE_SECONDS, os._exit, 1)
        return Failure.of(error)
    except ServingError as error:
        return Failure.of(error)
    except Exception as error:  # its message may hold contents, and Ray would log it
        _log.error("%s while an answer was written", type(error).__name__)
        return Failure.of(InternalError(f"a mistake of this server ({type(error).__name__}); its log says where"))
