"""A subnet in memory with neurons on it, for the tests of what speaks to a chain."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from condense_core.neurons.chain.memory import MemoryChain, Subnet
from condense_core.neurons.chain.sdk import Backoff, SdkChain
from condense_core.neurons.chain.substrate import LocalNode, MemorySubstrate

NETUID = 7


def key(name: str) -> Any:
    """The key pair of a name, the same each time."""
    from bittensor.sp_core import Keypair

    return Keypair.create_from_uri(f"//{name}")


@dataclass
class World:
    """A chain whose clock stands still: a validator of uid 0 with a permit, miners from uid 1 on."""

    settings: dict[str, Any] = field(default_factory=dict)
    miners: int = 3
    chain: MemoryChain = field(default_factory=MemoryChain)
    slept: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.net: Subnet = self.chain.create_subnet(NETUID, **self.settings)
        self.validator = key("validator")
        self.chain.register(NETUID, self.validator.ss58_address, stake=1000, permit=True)
        for n in range(1, self.miners + 1):
            self.chain.register(NETUID, key(f"miner{n}").ss58_address)
        self.node = LocalNode(self.chain)
        # A newcomer waits out the rate limit once, and has done so when a test begins.
        self.chain.advance(min(100, self.net.weights_rate_limit))

    def sees(self, wallet: Any = None, **more: Any) -> SdkChain:
        """The chain as the owner of ``wallet`` sees it; waiting takes no time and is written down in ``slept``."""

        async def sleep(seconds: float) -> None:
            self.slept.append(seconds)

        more = {"backoff": Backoff(attempts=4, first=1.0, most=8.0), "share": lambda: 1.0, "sleep": sleep, **more}
        return SdkChain("local", NETUID, wallet=wallet, substrate=MemorySubstrate(self.node), **more)
