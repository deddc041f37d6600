"""What a run of load is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from condense_core.compressor.config import COMPRESSION_METHODS, check_ratio
from condense_core.serving.load.connection import Origin
from condense_core.serving.load.mix import LogUniform, Mix

DEFAULT_RATE, DEFAULT_SECONDS, DEFAULT_TIMEOUT = 5.0, 30.0, 30.0
MAX_CONNECTIONS = 900
"""Below what ``select`` takes, and below the connections that ``condense serve`` allows."""
MAX_RATE, MAX_REQUESTS, MAX_TIMEOUT = 10_000.0, 1_000_000, 3600.0


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """What a run of load is.

    Attributes:
        server: its URL.
        rate: arrivals a second, at random times that do not depend on the answers. concurrency: instead, clients that
            each ask again once they were answered. One of them, or neither (5 a second).
        duration: seconds in which requests begin; None: 30, or as long as ``requests`` takes.
        requests: at most so many.
        timeout: seconds that the server is given for each.
        method, ratio: for requests of which the mix names none.
        mix: what is asked.
        repeat: share of the requests that come again.
        seed: of arrivals, lengths and texts.
        max_connections: at once; who finds none waits, and is late.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    server: str = "http://127.0.0.1:8000"
    rate: float | None = None
    concurrency: int | None = None
    duration: float | None = None
    requests: int | None = None
    timeout: float = DEFAULT_TIMEOUT
    method: str | None = None
    ratio: float | None = None
    mix: Mix = field(default_factory=LogUniform)
    repeat: float = 0.0
    seed: int = 0
    max_connections: int = MAX_CONNECTIONS

    def __post_init__(self) -> None:
        Origin.parse(self.server)
        if self.rate is not None and self.concurrency is not None:
            raise ValueError("concurrency: got a rate too, expected one of them")
        _check("rate", self.rate, MAX_RATE)
        _check("duration", self.duration, 7 * 24 * 3600)
        _check("timeout", self.timeout, MAX_TIMEOUT)
        for name, most in (
            ("concurrency", MAX_CONNECTIONS),
            ("requests", MAX_REQUESTS),
            ("max_connections", MAX_CONNECTIONS),
        ):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 1 <= value <= most):
                raise ValueError(f"{name}: got {value!r:.40}, expected an integer from 1 to {most:,}")
        if not 0 <= self.repeat < 1:
            raise ValueError(f"repeat: got {self.repeat!r:.40}, expected a share of at least 0 and below 1")
        if self.method is not None and self.method not in COMPRESSION_METHODS:
            raise ValueError(f"method: got {self.method!r:.60}, expected one of {', '.join(COMPRESSION_METHODS)}")
        if self.ratio is not None:
            check_ratio(self.ratio)

    @property
    def seconds(self) -> float:
        """In which requests begin; infinite where their number ends the run."""
        if self.duration is not None:
            return self.duration
        return DEFAULT_SECONDS if self.requests is None else math.inf

    @property
    def arrivals_per_second(self) -> float | None:
        """Of an open loop; None: clients that wait for their answers."""
        if self.concurrency is not None:
            return None
        return DEFAULT_RATE if self.rate is None else self.rate

    def describe(self) -> dict[str, object]:
        """What a record says of it."""
        return {
            "server": self.server,
            "rate": self.arrivals_per_second,
            "concurrency": self.concurrency,
            "duration": None if math.isinf(self.seconds) else self.seconds,
            "requests": self.requests,
            "timeout": self.timeout,
            "method": self.method,
            "ratio": self.ratio,
            "mix": self.mix.describe(),
            "repeat": self.repeat,
            "seed": self.seed,
            "max_connections": self.max_connections,
        }


def _check(name: str, value: float | None, most: float) -> None:
    if value is not None and not 0 < value <= most:
        raise ValueError(f"{name}: got {value!r:.40}, expected a number above 0 and at most {most:g}")
