"""How long work will take, learned from how long such work took: the basis on which requests are accepted."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from threading import Lock

_FORGET = 0.9  # weight of what is known beside a new measurement: about the last ten count


@dataclass
class _Line:
    """Seconds as a line over tokens, fitted with exponentially fading weights; neither part is below zero."""

    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        for name, value in (
            ("weight", 1.0),
            ("x", tokens),
            ("y", seconds),
            ("xx", tokens**2),
            ("xy", tokens * seconds),
        ):
            setattr(self, name, _FORGET * getattr(self, name) + value)

    def at(self, tokens: int) -> float:
        x, y = self.x / self.weight, self.y / self.weight
        spread = self.xx / self.weight - x * x
        slope = (self.xy / self.weight - x * y) / spread if spread > 1e-6 * x * x else y / max(x, 1e-9)
        slope = min(max(slope, 0.0), y / max(x, 1e-9))  # at most proportional: the rest is there at any length
        return max(y + slope * (tokens - x), 0.0)


@dataclass
class CostModel:
    """Expected seconds of work, by its kind; 0 for a kind that was never measured. Any thread may use it."""

    _lines: dict[Hashable, _Line] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def observe(self, kind: Hashable, tokens: int, seconds: float) -> None:
        """Work of ``kind`` over so many tokens took so long."""
        with self._lock:
            self._lines.setdefault(kind, _Line()).add(tokens, seconds)

    def seconds(self, kind: Hashable, tokens: int) -> float:
        """How long such work will take."""
        with self._lock:
            line = self._lines.get(kind)
            return line.at(tokens) if line else 0.0
