"""A miner that answers at a higher ratio than it was asked for, so that miners of one method differ in quality.

It is a backend of one's own (``condense-miner --backend condense_core.neurons.local.coarser:Coarser``). Its settings
come from the environment variable CONDENSE_COARSER, as JSON: ``server``, ``method``, ``factor``, and ``most``, the
highest ratio that the method has.
"""

from __future__ import annotations

import json
import os

from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.neurons.mining.backends import RemoteBackend
from condense_core.neurons.protocol.messages import Ask

VARIABLE = "CONDENSE_COARSER"


class Coarser(RemoteBackend):
    """A ``condense serve`` that is asked for ``factor`` times the ratio."""

    def __init__(self) -> None:
        try:
            told = json.loads(os.environ[VARIABLE])
            super().__init__(str(told["server"]), method=str(told["method"]))
            self.factor, self.most = float(told["factor"]), float(told["most"])
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{VARIABLE}: expected JSON with server, method, factor and most") from error

    async def compress(self, ask: Ask, *, priority: int, timeout: float) -> SoftTokens:
        ratio = max(ask.ratio, min(ask.ratio * self.factor, self.most))
        return await super().compress(ask.model_copy(update={"ratio": ratio}), priority=priority, timeout=timeout)
