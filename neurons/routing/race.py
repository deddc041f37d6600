"""Asks one candidate after the other, several at a time, until enough have answered or the time is over."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

T = TypeVar("T")
A = TypeVar("A")

SPARE = 3
"""Candidates that are asked at once beyond those that are needed."""


async def race(
    candidates: Iterable[T],
    attempt: Callable[[T], Awaitable[A | None]],
    *,
    want: int,
    until: float,
    patience: Callable[[T, float], float],
) -> list[A]:
    """What the first ``want`` attempts gave, in the order in which they ended; fewer where the time was over.

    An attempt that fails is replaced by the next candidate at once. One that takes long stays, and the next candidate
    is asked beside it; where ``SPARE`` more than needed are asked already, the one that has had longest is given up.
    What still runs at the end is cancelled.

    Args:
        attempt: gives None where it fails.
        until: when to end, on the event loop's clock.
        patience: seconds to wait for a candidate before the next one is asked too, of the seconds that are left.
    """
    loop, waiting = asyncio.get_running_loop(), iter(candidates)
    running: list[asyncio.Task[A | None]] = []  # the one that has had longest first
    found: list[A] = []
    next_at = until

    def begin() -> bool:
        nonlocal next_at
        candidate = next(waiting, None)
        if candidate is None:
            next_at = until
            return False
        running.append(asyncio.ensure_future(attempt(candidate)))
        next_at = loop.time() + patience(candidate, until - loop.time())
        return True

    try:
        for _ in range(want):
            begin()
        while running and len(found) < want and (now := loop.time()) < until:
            done, _ = await asyncio.wait(
                running, timeout=min(next_at, until) - now, return_when=asyncio.FIRST_COMPLETED
            )
            for task in [task for task in running if task in done]:
                running.remove(task)
                answer = task.result()
                if answer is not None:
                    found.append(answer)
                elif len(running) < want - len(found):
                    begin()
            if not done and loop.time() >= next_at and begin() and len(running) > want - len(found) + SPARE:
                running.pop(0).cancel()
        return found[:want]
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
