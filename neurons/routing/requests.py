"""What an application may ask a gateway for beyond what any server is asked for: a tier, and who answers."""

from __future__ import annotations

from dataclasses import dataclass

from condense_core.serving.errors import InvalidRequest
from condense_core.serving.requests import CompressRequest

ROUTINGS = ("best", "fastest", "one", "k_of_n")
MAX_K = 8
DEFAULT_K = 3


@dataclass(frozen=True, kw_only=True)
class RoutedRequest(CompressRequest):
    """A text to be made soft tokens of by miners.

    Attributes:
        tier: under whose limits; None: the first that the text fits. model: of the tiers that count; None: any.
        routing: one of ``ROUTINGS``; None: ``one`` where a miner is named, ``k_of_n`` where k is, else the gateway's.
        miner: its hotkey or uid, for ``one``. k: valid answers that are waited for and compared, for ``k_of_n``.
    """

    tier: str | None = None
    model: str | None = None
    routing: str | None = None
    miner: str | int | None = None
    k: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method is not None:
            raise InvalidRequest(f"method: got {self.method!r:.60}, expected none: each miner has its own")
        if self.routing is None:
            named = "one" if self.miner is not None else "k_of_n" if self.k is not None else None
            object.__setattr__(self, "routing", named)
        if self.routing not in (None, *ROUTINGS):
            raise InvalidRequest(f"routing: got {self.routing!r:.60}, expected one of {', '.join(ROUTINGS)}")
        if (self.miner is not None) != (self.routing == "one"):
            raise InvalidRequest("miner: expected a hotkey or a uid for the routing one, and none for others")
        if self.miner is not None and type(self.miner) not in (str, int):
            raise InvalidRequest(f"miner: got {self.miner!r:.40}, expected a hotkey or a uid")
        if self.k is not None and self.routing != "k_of_n":
            raise InvalidRequest("k: expected for the routing k_of_n only")
        if self.k is not None and (type(self.k) is not int or not 1 <= self.k <= MAX_K):
            raise InvalidRequest(f"k: got {self.k!r:.40}, expected an integer from 1 to {MAX_K}")
