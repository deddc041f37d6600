"""What an engine reports of itself while it runs, and to whom. ``prometheus`` has the observer that is scraped."""

from __future__ import annotations

from collections.abc import Hashable, Mapping


class Observer:
    """Is told what an engine does; this one keeps nothing of it. Calls come from several threads."""

    def ended(self, kind: Hashable, code: str, seconds: float) -> None:
        """A request of ``kind`` ended after so many seconds, in ``ok``, ``cancelled`` or the code of its error."""

    def stage(self, stage: str, seconds: float) -> None:
        """A request spent so long in a stage: ``tokenize``, ``queue`` or ``write``."""

    def batch(self, kind: Hashable, requests: int, tokens: int, seconds: float, stages: Mapping[str, float]) -> None:
        """So much ran together; stages: seconds of ``encode``, ``pool`` and ``project``."""

    def depth(self, waiting: int) -> None:
        """So many requests wait now."""

    def cache_hit(self) -> None:
        """A request was answered from the results of earlier ones."""

    def out_of_memory(self) -> None:
        """A batch had too little memory."""

    def written(self, num_bytes: int, seconds: float) -> None:
        """An answer of so many bytes was made for the wire."""


NO_METRICS = Observer()
