"""Whether there is a newer version, for operators who want to be told. Nothing is ever installed.

It is off unless ``--check-updates`` is given: a neuron talks to nobody whom its operator did not name.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Annotated

import typer
from packaging.version import Version

from condense_core._version import __version__

URL = "https://pypi.org/pypi/condense-core/json"
EVERY = 86_400.0
MOST_BYTES = 4 * 2**20
SECONDS = 20.0
_log = logging.getLogger(__name__)

CheckUpdates = Annotated[
    bool,
    typer.Option(
        "--check-updates",
        help="Ask the package index once a day whether there is a newer version, and log it. Nothing is installed.",
        envvar="CHECK_UPDATES",
    ),
]


class NotTold(Exception):
    """The package index did not say."""


async def newest(url: str = URL) -> Version:
    """The newest version that the package index has.

    Raises:
        NotTold: it does not answer in time, answers elsewhere or too much, or names no version.
    """
    import httpx

    body = bytearray()
    try:
        async with (
            asyncio.timeout(SECONDS),
            httpx.AsyncClient(follow_redirects=False, timeout=SECONDS) as client,
            client.stream("GET", url, headers={"accept-encoding": "identity"}) as answer,
        ):
            if answer.status_code != 200:
                raise NotTold(f"status {answer.status_code}, expected 200")
            async for part in answer.aiter_raw():
                body += part
                if len(body) > MOST_BYTES:
                    raise NotTold(f"more than {MOST_BYTES:,} bytes")
        found = json.loads(body)["info"]["version"]
        if not isinstance(found, str) or len(found) > 64:
            raise NotTold("no version")
        return Version(found)
    except TimeoutError:
        raise NotTold(f"no answer within {SECONDS:g} s") from None
    except httpx.HTTPError as error:
        raise NotTold(type(error).__name__) from None
    except (ValueError, KeyError, TypeError, RecursionError):  # InvalidVersion is a ValueError
        raise NotTold("no version") from None


async def tell_updates(
    *,
    url: str = URL,
    current: str = __version__,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Ask once a day until this is cancelled, and log each newer version once."""
    told = Version(current)
    while True:
        try:
            found = await newest(url)
        except NotTold as error:
            _log.warning("updates", extra={"detail": f"the package index does not say what is newest: {error}"})
        else:
            if found > told:
                told = found
                detail = f"condense-core {found} is there, this is {current}; see its CHANGELOG before you upgrade"
                _log.warning("updates", extra={"detail": detail})
        await sleep(EVERY)


async def telling_updates(serving: Awaitable[None], wanted: bool) -> None:
    """``serving``, and beside it ``tell_updates`` where that is ``wanted``."""
    telling = asyncio.ensure_future(tell_updates()) if wanted else None
    try:
        await serving
    finally:
        if telling is not None:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)
