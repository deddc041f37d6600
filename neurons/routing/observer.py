"""A gateway's figures for Prometheus: those of any server, and what became of its attempts."""

from __future__ import annotations

import torch
from prometheus_client import Counter, Gauge

from condense_core.serving.prometheus import PrometheusObserver


class GatewayObserver(PrometheusObserver):
    """Counts into a registry of its own. Labels are names of the tiers' file and of this code, never a client's."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self._attempts = Counter(
            "condense_gateway_attempts",
            "Miners asked, by tier and outcome",
            ["tier", "outcome"],
            registry=self.registry,
        )
        self._miners = Gauge("condense_gateway_miners", "Miners that serve a tier", ["tier"], registry=self.registry)

    def attempted(self, tier: str, outcome: str) -> None:
        """A miner was asked: it was valid, late, refused, unreached, unsigned or invalid, or given up."""
        self._attempts.labels(tier, outcome).inc()

    def miners(self, tier: str, count: int) -> None:
        """So many miners serve a tier now."""
        self._miners.labels(tier).set(count)
