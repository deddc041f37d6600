"""A validator from its start to its end, in one event loop: chain, judges, rounds and what it shows."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from condense_core.neurons.chain.base import Chain
from condense_core.neurons.chain.clock import ClockWatch
from condense_core.neurons.chain.errors import ChainFailure, TemporaryRefusal
from condense_core.neurons.chain.watching import registered
from condense_core.neurons.judging.judge import Judge
from condense_core.neurons.judging.opened import open_judge
from condense_core.neurons.tiers import Tiers
from condense_core.neurons.validating.board import board
from condense_core.neurons.validating.loop import Validator
from condense_core.neurons.validating.rounds import play
from condense_core.neurons.validating.status import LIMITS, Figures, create_status_app
from condense_core.serving.http.guard import Guard
from condense_core.serving.http.server import Server

_log = logging.getLogger("condense_core.neurons")
_PATIENCE = 60.0  # seconds at the end of so many rounds


def load_judges(
    tiers: Tiers, models: Sequence[str], *, device: str | None, dtype: str | None, threads: int | None
) -> dict[str, Judge]:
    """A judge of each tier's model.

    models: folders or names to load instead (``Tiers.sources``).

    Raises:
        ValueError: a model cannot be loaded, this machine cannot hold it, or one of ``models`` is no tier's.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    return {name: open_judge(source, device=device, dtype=dtype) for name, source in tiers.sources(models).items()}


async def check_registered(chain: Chain) -> dict[str, Any]:
    """What the chain says of this validator.

    Raises:
        ChainFailure: there is no chain, or it does not know the hotkey. WrongClock: signatures would be refused.
    """
    metagraph = await registered(chain)
    own = metagraph.by_hotkey[chain.hotkey or ""]
    await ClockWatch(chain).check()
    if not own.validator_permit:
        _log.warning("permit", extra={"detail": f"uid {own.uid} has no validator permit: miners refuse it until then"})
    facts: dict[str, Any] = {"hotkey": own.hotkey, "netuid": chain.netuid, "uid": own.uid, "block": metagraph.block}
    return {**facts, "permit": own.validator_permit, "stake": own.stake}


async def tried(validator: Validator) -> dict[str, Any]:
    """One round of each tier, of which nothing is written down or published; errors as of ``serve``."""
    try:
        facts, tiers = await check_registered(validator.chain), {}
        metagraph = await validator.look()
        for name, tier in validator.tiers.tiers.items():
            challenge = await validator.challenge(name)
            played = await play(name, tier, challenge, validator.judges[tier.model], validator.peers)
            tiers[name] = {
                "miners": len(played.outcomes),
                "scored": sum(outcome.value > 0 for outcome in played.outcomes),
                "asking_seconds": round(played.asking, 3),
                "judging_seconds": round(played.judging, 3),
            }
        silent = {peer.uid: why for peer, why in validator.peers.silent()}
        return {**facts, "neurons": len(metagraph.neurons), "silent": silent, "tiers": tiers}
    finally:
        await _ended(validator)


async def serve(
    validator: Validator,
    bound: socket.socket,
    *,
    rounds: int | None = None,
    every: float = 60.0,
    started: Callable[[], None] | None = None,
) -> None:
    """Play rounds until SIGINT or SIGTERM, behind the round that runs, or ``rounds`` of each paid tier.

    bound: where the leaderboard is shown. started: called once that is so and the chain knows the validator.

    Raises:
        ChainFailure: there is no chain, or it does not know the hotkey. WrongClock: signatures would be refused.
    """
    loop = asyncio.get_running_loop()
    try:
        facts = await check_registered(validator.chain)
        figures = Figures(lambda: validator.setter.set_at)
        validator.on_round = partial(figures.played, standing=validator.standing)
        app = _app(validator, figures, facts)
        server = Server(app, limits=LIMITS, stop_seconds=1.0, started=started, signals=False)
        showing = asyncio.ensure_future(server.serve(sockets=[bound]))
        watching = asyncio.ensure_future(ClockWatch(validator.chain).run())
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, validator.stop)
        try:
            await validator.run(rounds=rounds, every=every)
            if rounds is not None:
                await _set_last(validator)
        finally:
            server.should_exit = True
            watching.cancel()
            await asyncio.gather(showing, watching, return_exceptions=True)
    finally:
        await _ended(validator)


def _app(validator: Validator, figures: Figures, facts: Mapping[str, Any]) -> Guard:
    own = {name: facts[name] for name in ("hotkey", "netuid", "uid")}

    def shown() -> dict[str, Any]:
        block = None if validator.metagraph is None else validator.metagraph.block
        waiting = {"waiting": validator.waiting, "weights_waiting": validator.setter.waiting}
        return board(validator.ledger, validator.tiers, **own, block=block, **waiting)

    return create_status_app(shown, figures, is_ready=lambda: not validator.waiting)


async def _set_last(validator: Validator) -> None:
    """Set what the last rounds say, where the chain takes it soon."""
    for attempt in (1, 2):
        try:
            await validator.set_weights()
            return
        except TemporaryRefusal as error:
            wait = error.retry_after or 0.0
            if attempt == 2 or wait > _PATIENCE:
                _log.warning("weights", extra={"detail": f"{error}; the row on the chain is of an earlier round"})
                return
            await asyncio.sleep(wait)
        except ChainFailure as error:
            _log.error("weights", extra={"detail": str(error)})
            return


async def _ended(validator: Validator) -> None:
    await validator.supply.aclose()
    await validator.client.aclose()
    await validator.chain.close()
    validator.ledger.close()
    if validator.audits is not None:
        validator.audits.close()
