"""The chain that a command line names: a public one, a node's, or one in memory that this host shares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from condense_core.neurons.chain.sdk import SdkChain

_MEMORY = "memory:"


def open_chain(network: str, netuid: int, **settings: Any) -> SdkChain:
    """The subnet ``netuid`` of ``network``, not yet connected; settings: of ``SdkChain``.

    network: what the SDK takes (``finney``, ``test``, ``local`` or a URL), or ``memory:`` and the socket of
    ``python -m condense_core.neurons.chain``.
    """
    if not network.startswith(_MEMORY):
        return SdkChain(network, netuid, **settings)
    from condense_core.neurons.chain.server import RemoteNode
    from condense_core.neurons.chain.substrate import MemorySubstrate

    node = RemoteNode(Path(network.removeprefix(_MEMORY)))
    return SdkChain("local", netuid, substrate=MemorySubstrate(node), **settings)


def is_of_this_host(network: str) -> bool:
    """Whether its neurons are tests on this host, at addresses that nobody else reaches."""
    return network.startswith(_MEMORY) or network == "local"
