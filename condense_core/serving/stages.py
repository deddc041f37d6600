"""Where the seconds of a compression go."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from condense_core.compressor.condenser import Condenser

Stages = dict[str, float]
"""Seconds by stage of what ran together."""


class StageClock:
    """Seconds that a condenser spends in its pooler and in its projection, and in all else: the encoder."""

    def __init__(self, condenser: Condenser) -> None:
        self._cuda = condenser.device.type == "cuda"
        self._device = condenser.device
        self._spans: list[tuple[str, Any, Any]] = []
        self._started: Any = None
        for name, stage in (("pooler", "pool"), ("projection", "project")):
            module = condenser.compressor.own_modules().get(name)
            if module is not None:
                self._watch(module, stage)

    def _watch(self, module: nn.Module, stage: str) -> None:
        begun: list[Any] = []

        def before(*_: Any) -> None:
            begun.append(self._mark())

        def after(_module: nn.Module, _inputs: Any, _output: Tensor) -> None:
            self._spans.append((stage, begun.pop(), self._mark()))

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _between(self, first: Any, second: Any) -> float:
        return float(first.elapsed_time(second)) * 1e-3 if self._cuda else float(second - first)

    def start(self) -> None:
        self._spans.clear()
        self._started = self._mark()

    def stop(self) -> Stages:
        """Seconds by stage since ``start``; waits for the device."""
        ended = self._mark()
        if self._cuda:
            ended.synchronize()
        stages: Stages = {"pool": 0.0, "project": 0.0}
        for stage, first, second in self._spans:
            stages[stage] += self._between(first, second)
        return {"encode": self._between(self._started, ended) - sum(stages.values()), **stages}
