"""An application that asks the gateway of a local subnet for compression, now and then."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from condense_core.neurons.tiers import Tier
from condense_core.serving.client import CondenseClient
from condense_core.serving.errors import ServingError
from condense_core.tasks.demo import demo_text

_RATIO = 4.0
_PATIENCE = 30.0


class Customer:
    """Asks for soft tokens of a text of the tier's length, at most every ``every`` seconds.

    Attributes:
        answered: requests. failed: those that were not, by the code of the error.
    """

    def __init__(self, url: str, tier: Tier, *, every: float = 3.0) -> None:
        text = demo_text()
        self.text = (text * (1 + tier.min_chars // len(text)))[: tier.max_chars]
        self.ratio = min(max(_RATIO, tier.min_ratio), tier.max_ratio)
        self.answered, self.failed = 0, Counter[str]()
        self._client, self._every, self._at = CondenseClient(url, timeout=_PATIENCE, retries=0), every, 0.0

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def ask(self) -> None:
        """Ask, where it is time for it."""
        if time.monotonic() - self._at < self._every:
            return
        try:
            self._client.compress(self.text, ratio=self.ratio)
            self.answered += 1
        except ServingError as error:
            self.failed[error.code] += 1
        self._at = time.monotonic()

    def facts(self) -> dict[str, Any]:
        """How often it was answered, and how often not."""
        return {"answered": self.answered, "failed": dict(self.failed)}
