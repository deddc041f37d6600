"""How a chain refuses: what passes if one waits, and what does not.

Each message is one line. A ``TemporaryRefusal`` says when to try again as far as that is known; a ``FinalRefusal``
stays what it is until a person has changed something: a key, the stake, a setting.
"""

from __future__ import annotations


class ChainFailure(Exception):
    """Base of everything that a chain raises; ``name`` is the chain's own name of the error, "" if it gave none."""

    def __init__(self, message: str, *, name: str = "") -> None:
        super().__init__(" ".join(message.split()))
        self.name = name


class TemporaryRefusal(ChainFailure):
    """The same request can succeed later, in ``retry_blocks`` blocks or ``retry_after`` seconds (None: unknown)."""

    def __init__(
        self, message: str, *, name: str = "", retry_after: float | None = None, retry_blocks: int | None = None
    ) -> None:
        super().__init__(message, name=name)
        self.retry_after = retry_after
        self.retry_blocks = retry_blocks


class RateLimited(TemporaryRefusal):
    """The hotkey did the same too few blocks ago."""


class ConnectionLost(TemporaryRefusal):
    """The chain did not answer, or the connection broke and could not be opened again in the attempts allowed."""


class TooManyCommits(TemporaryRefusal):
    """As many commits of weights wait to be revealed as the chain holds; they are revealed at an epoch's end."""


class PoolRefused(TemporaryRefusal):
    """The node did not take the transaction into a block: outdated, replaced by another, or no room."""


class FinalRefusal(ChainFailure):
    """The same request will be refused again."""


class NoChain(FinalRefusal):
    """No chain answered at the address, not once."""


class NoSubnet(FinalRefusal):
    """The chain has no such subnet or no such mechanism."""


class NotRegistered(FinalRefusal):
    """The hotkey has no uid on the subnet."""


class NotAuthorized(FinalRefusal):
    """The hotkey may not do this: it lacks a validator permit, or another holds the only one."""


class InvalidRequest(FinalRefusal):
    """An argument is not what the chain takes."""


class WrongVersion(InvalidRequest):
    """The version key is older than the subnet's: this software must be updated before it sets weights."""


class OtherRefusal(FinalRefusal):
    """The chain refused for a reason that this list does not know; the message is the chain's."""
