"""Good answers in the name of others, or of other times."""

from __future__ import annotations

from condense_core.neurons.extra import bittensor_module
from condense_core.neurons.local.adversaries.means import Adversary
from condense_core.neurons.mining.app import Caller
from condense_core.neurons.protocol.signing import HEADER_HOTKEY, sign_response


class Unsigned(Adversary):
    """Signs nothing."""

    def signed(self, payload: bytes, caller: Caller) -> dict[str, str]:
        return {}


class Forger(Adversary):
    """Signs with a key of its own, and says that it is the miner's."""

    def signed(self, payload: bytes, caller: Caller) -> dict[str, str]:
        other = bittensor_module("bittensor.sp_core").Keypair.create_from_uri("//forger")
        own = {"nonce_ns": caller.nonce_ns, "caller": caller.hotkey, "status": 200, "body": payload}
        return {**sign_response(other, **own), HEADER_HOTKEY: self.hotkey.ss58_address}


class Misdirector(Adversary):
    """Signs for another receiver, as who passes an answer on that was meant for somebody else."""

    def signed(self, payload: bytes, caller: Caller) -> dict[str, str]:
        other = Caller(self.hotkey.ss58_address, caller.nonce_ns)
        return super().signed(payload, other)


class Repeater(Adversary):
    """Sends its first answer again and again, with the signature that it had."""

    _first: tuple[bytes, dict[str, str]] | None = None

    async def answer(self, body: bytes, caller: Caller) -> tuple[bytes, dict[str, str]]:
        if self._first is None:
            _, self._first = b"", await super().answer(body, caller)
            return b"", self.signed(b"", caller)
        return self._first
