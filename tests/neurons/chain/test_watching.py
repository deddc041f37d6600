"""Looking goes on, whatever ends a look; mining/test_follower.py has what a chain's refusals do to it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from condense_core.neurons.chain.errors import ConnectionLost, NoSubnet
from condense_core.neurons.chain.watching import keep_looking


def test_refusals_and_mistakes_end_no_watch(caplog: pytest.LogCaptureFixture) -> None:
    looks: Iterator[Exception | None] = iter(
        [None, KeyError("secret"), ConnectionLost("away"), ConnectionLost("away"), NoSubnet("gone"), None]
    )
    slept: list[float] = []

    async def look() -> None:
        if (error := next(looks)) is not None:
            raise error

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 7:
            raise asyncio.CancelledError

    async def use() -> None:
        with pytest.raises(asyncio.CancelledError):
            await keep_looking(look, 10.0, sleep=sleep)

    asyncio.run(use())
    assert slept == [10, 10, 10, 20, 40, 600, 10]
    details = [record.__dict__["detail"] for record in caplog.records]
    assert [detail.split(" ")[0] for detail in details] == ["a", "away;", "away;", "gone;"]
    assert "KeyError at watching.py:" in details[0]
    assert "secret" not in caplog.text
