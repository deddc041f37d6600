"""The hotkey of a wallet, which is all of it that a neuron opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from condense_core.neurons.extra import bittensor_module


def open_hotkey(wallet: str, hotkey: str, folder: Path) -> Any:
    """The key pair of a wallet's hotkey; ``ValueError`` of one line where there is none, or it is locked."""
    bittensor = bittensor_module()
    try:
        return bittensor.Wallet(name=wallet, hotkey=hotkey, path=str(folder.expanduser())).hotkey
    except Exception as error:  # the SDK's kinds of errors for it are several, and change
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"hotkey: {hotkey!r} of wallet {wallet!r} in {folder} cannot be opened ({why})") from None
