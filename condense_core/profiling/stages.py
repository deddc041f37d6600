"""Seconds of each stage of a compression, taken where its modules begin and end."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

import torch

from condense_core.compressor.compressor import Compressor

STAGES = ("embed", "encode", "pool", "project")


class StageTimer:
    """As a context, around calls of ``compressor``: hooks on its modules add up how long each of ``STAGES`` took.

    On a CUDA device times are those of the device's own work, between events; nothing waits inside.
    """

    def __init__(self, compressor: Compressor, device: torch.device) -> None:
        self._device = device
        self._watched = {
            "embed": compressor.embed_tokens,
            "encode": compressor.encoder,
            "pool": compressor.pooler,
            "project": compressor.projection,
        }
        self._handles: list[Any] = []
        self._spans: list[tuple[str, Any, Any]] = []

    def __enter__(self) -> StageTimer:
        for stage, module in self._watched.items():
            if module is not None:
                self._watch(stage, module)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _watch(self, stage: str, module: Any) -> None:
        begun: list[Any] = []

        def before(*_: Any) -> None:
            begun.append(self._mark())

        def after(*_: Any) -> None:
            self._spans.append((stage, begun.pop(), self._mark()))

        self._handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def take(self) -> dict[str, float]:
        """Seconds by stage since the last call; the device must have finished."""
        found = dict.fromkeys(STAGES, 0.0)
        for stage, first, last in self._spans:
            found[stage] += first.elapsed_time(last) * 1e-3 if self._device.type == "cuda" else last - first
        self._spans.clear()
        return found
