"""An engine's figures for Prometheus."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Hashable, Mapping
from functools import partial
from threading import Lock

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from condense_core.serving.metrics import Observer

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_RECENT = 512  # latencies that the page's percentiles are of


class PrometheusObserver(Observer):
    """Counts into a registry of its own, so that several servers of a process do not mix."""

    def __init__(self, device: torch.device) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "condense_requests", "Requests ended, by kind and outcome", ["kind", "code"], registry=registry
        )
        self._latency = Histogram(
            "condense_request_seconds", "From arrival to result", ["kind"], buckets=_SECONDS, registry=registry
        )
        self._stages = Histogram(
            "condense_stage_seconds",
            "Of a request in queue, tokenize and write; of a batch in encode, pool and project",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._batch = Histogram(
            "condense_batch_requests", "Requests that ran together", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self._tokens = Counter("condense_tokens", "Tokens read", ["kind"], registry=registry)
        self._bytes = Counter("condense_answer_bytes", "Bytes of soft tokens and caches", registry=registry)
        self._depth = Gauge("condense_queue_depth", "Requests that wait", registry=registry)
        self._hits = Counter("condense_cache_hits", "Requests answered from earlier results", registry=registry)
        self._ooms = Counter("condense_out_of_memory", "Batches that had too little memory", registry=registry)
        self._http = Counter("condense_http_responses", "Responses", ["route", "status"], registry=registry)
        if device.type == "cuda":
            for name, what in (("allocated", torch.cuda.memory_allocated), ("reserved", torch.cuda.memory_reserved)):
                gauge = Gauge(f"condense_device_memory_{name}_bytes", f"Device memory {name}", registry=registry)
                gauge.set_function(partial(what, device))
        self._recent: deque[tuple[float, float]] = deque(maxlen=_RECENT)
        self._lock = Lock()

    def ended(self, kind: Hashable, code: str, seconds: float) -> None:
        name = _name(kind)
        self._requests.labels(name, code).inc()
        if code == "ok":
            self._latency.labels(name).observe(seconds)
            with self._lock:
                self._recent.append((time.monotonic(), seconds))

    def stage(self, stage: str, seconds: float) -> None:
        self._stages.labels(stage).observe(seconds)

    def batch(self, kind: Hashable, requests: int, tokens: int, seconds: float, stages: Mapping[str, float]) -> None:
        self._batch.observe(requests)
        self._tokens.labels(_name(kind)).inc(tokens)
        for stage, spent in stages.items():
            self._stages.labels(stage).observe(spent)

    def depth(self, waiting: int) -> None:
        self._depth.set(waiting)

    def cache_hit(self) -> None:
        self._hits.inc()

    def out_of_memory(self) -> None:
        self._ooms.inc()

    def written(self, num_bytes: int, seconds: float) -> None:
        self._bytes.inc(num_bytes)
        if seconds:
            self._stages.labels("write").observe(seconds)

    def responded(self, route: str, status: int) -> None:
        """A response left; route: one of the application's, not what a client asked for."""
        self._http.labels(route, str(status)).inc()

    def recent_ms(self) -> dict[str, float]:
        """Percentiles of the latest latencies, in milliseconds."""
        with self._lock:
            found = sorted(seconds for _, seconds in self._recent)
        if not found:
            return {}
        return {
            name: round(1e3 * found[min(int(share * len(found)), len(found) - 1)], 2)
            for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
        }

    def exposition(self) -> bytes:
        """What ``GET /metrics`` answers with."""
        return generate_latest(self.registry)


def _name(kind: Hashable) -> str:
    """A kind as a label: names of the server's, never a client's text."""
    return kind[0] if isinstance(kind, tuple) else str(kind)
