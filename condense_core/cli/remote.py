"""Commands with ``--server``: they ask ``condense serve`` instead of loading a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from condense_core.cli.terminal import working

if TYPE_CHECKING:
    from condense_core.serving.client import CondenseClient

DEFAULT_TIMEOUT = 60.0
_RETRIES = 3  # whoever waits at a terminal is told soon that there is no server

Server = Annotated[
    str | None,
    typer.Option(
        "--server",
        help="Ask this server (condense serve) instead of loading a model. Its key is read from CONDENSE_API_KEY.",
        metavar="URL",
        show_default=False,
    ),
]
Timeout = Annotated[
    float | None, typer.Option(help="Seconds that --server may take.", show_default=f"{DEFAULT_TIMEOUT:g}")
]


def check_options(server: str | None, timeout: float | None, **local: object) -> None:
    """``ValueError`` where one of the options ``local``, of a model that is loaded, is given with a server."""
    if server is None:
        if timeout is not None:
            raise ValueError("--timeout: how long a server may take; expected with --server")
        return
    for name, value in local.items():
        if value is not None:
            raise ValueError(f"--{name.replace('_', '-')}: of a model that runs here, expected without --server")


@contextmanager
def asking(server: str, timeout: float | None) -> Iterator[CondenseClient]:
    """A client of ``server``, with a spinner; its errors become ``ValueError``."""
    from condense_core.serving.client import CondenseClient
    from condense_core.serving.errors import ServingError

    seconds = DEFAULT_TIMEOUT if timeout is None else timeout
    try:
        client = CondenseClient(server, timeout=seconds, retries=_RETRIES)
    except ValueError as error:
        raise ValueError(str(error).replace("base_url:", "--server:")) from None
    try:
        with client, working("asking the server"):
            yield client
    except ServingError as error:
        raise ValueError(str(error)) from None
