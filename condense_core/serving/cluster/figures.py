"""Figures of several processes as those of one server."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.registry import Collector

from condense_core.serving.cluster.replica import Report
from condense_core.serving.prometheus import PrometheusObserver

OF_CLIENTS = ("condense_requests", "condense_request_seconds", "condense_http_responses")
"""What the process that clients talk to counts by itself: a request that two replicas worked on was one request."""


class FrontObserver(PrometheusObserver):
    """Counts what clients got, and shows the replicas' figures beside it, with a label ``replica``."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.reports: Sequence[Report] = ()

    def exposition(self) -> bytes:
        merged = CollectorRegistry()
        merged.register(_Merged(self.registry.collect(), self.reports))
        return generate_latest(merged)


class _Merged(Collector):
    """Families of several registries, each once."""

    def __init__(self, own: Iterable[Metric], reports: Sequence[Report]) -> None:
        self._own, self._reports = own, reports

    def describe(self) -> list[Metric]:
        return []  # else registering would collect

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for family in self._own:
            self._add(families, family, {})
        for report in self._reports:
            for family in report.figures:
                if family.name not in OF_CLIENTS:
                    self._add(families, family, {"replica": report.replica})
        return families.values()

    def _add(self, families: dict[str, Metric], family: Metric, labels: dict[str, str]) -> None:
        found = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
        for sample in family.samples:
            found.add_sample(sample.name, {**sample.labels, **labels}, sample.value)
