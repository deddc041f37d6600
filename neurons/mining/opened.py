"""The backend that a command line names."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from condense_core.cli.options import check_compressor, check_dtype, checked_device
from condense_core.neurons.mining.backends import Backend, EngineBackend, RemoteBackend, own_backend
from condense_core.neurons.tiers import Tiers


@dataclass(frozen=True, kw_only=True)
class BackendChoice:
    """What compresses, as options say it.

    Attributes:
        model, compressors, method, device, dtype, threads: of an engine of this process.
        server: the URL of a ``condense serve``; its key comes from the environment variable CONDENSE_API_KEY.
        own: a class of one's own, as ``module:Class``.
    """

    model: str | None = None
    compressors: tuple[str, ...] = ()
    method: str | None = None
    server: str | None = None
    own: str | None = None
    device: str | None = None
    dtype: str | None = None
    threads: int | None = None

    def check(self) -> None:
        """``ValueError`` for what is wrong at sight, before anything is loaded."""
        if sum(each is not None for each in (self.model, self.server, self.own)) > 1:
            raise ValueError("model, server, backend: expected one of them at most")
        check_dtype(self.dtype)
        for folder in self.compressors:
            check_compressor(folder)

    def open(self, tiers: Tiers) -> Backend:
        """The backend, whose model is loaded and which has not started."""
        if self.own is not None:
            return own_backend(self.own)
        if self.server is not None:
            return RemoteBackend(self.server, api_key=os.environ.get("CONDENSE_API_KEY"), method=self.method)
        from condense_core.serving.engine import CompressionEngine
        from condense_core.serving.prometheus import PrometheusObserver
        from condense_core.serving.spec import EngineSpec

        models = sorted({tier.model for tier in tiers.tiers.values()})
        if self.model is None and len(models) > 1:
            raise ValueError(f"model: the tiers have {', '.join(models)}, expected --model with one of them")
        checked_device(self.device)
        spec = EngineSpec(
            model=self.model or models[0],
            methods=None if self.method is None else (self.method,),
            compressors=self.compressors,
            device=self.device,
            dtype=self.dtype,
            prunes=False,
            answers=False,
            threads=self.threads,
        )
        served = spec.load()
        return EngineBackend(CompressionEngine(served, limits=spec.limits, observer=PrometheusObserver(served.device)))


def observer_of(backend: Backend) -> Any:
    """What counts for ``/metrics``: the engine's own observer, or one of HTTP alone."""
    import torch

    from condense_core.serving.prometheus import PrometheusObserver

    if isinstance(backend, EngineBackend):
        return backend.engine.observer
    return PrometheusObserver(torch.device("cpu"))
