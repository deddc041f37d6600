"""Options that the commands of all neurons have in common."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

Netuid = Annotated[
    int | None, typer.Option(help="The subnet; it must be given.", min=0, envvar="NETUID", show_default=False)
]
Network = Annotated[
    str,
    typer.Option(
        help="finney, test, local, the URL of a node, or memory:SOCKET, a chain of this host for tests.",
        envvar="SUBTENSOR_NETWORK",
    ),
]
WalletName = Annotated[str, typer.Option("--wallet", help="Name of the wallet.", envvar="WALLET_NAME")]
HotkeyName = Annotated[
    str, typer.Option("--hotkey", help="Its hotkey, which signs; no coldkey is needed.", envvar="HOTKEY_NAME")
]
WalletPath = Annotated[Path, typer.Option(help="Folder of the wallets.", envvar="WALLET_PATH")]
_PROBED = 64 * 1024  # bytes, less than any state needs

WALLETS = Path("~/.bittensor/wallets")

TiersFile = Annotated[
    Path | None, typer.Option("--tiers", help="TOML file of the tiers.", show_default="the subnet's own")
]
State = Annotated[Path, typer.Option(help="Folder for what must outlive a restart.")]


def given_netuid(netuid: int | None) -> int:
    """The subnet; ``ValueError`` where none was given.

    The parser does not ask for it, since the option belongs to a command that has other commands below it, which need
    no subnet.
    """
    if netuid is None:
        raise ValueError("netuid: got none, expected --netuid NUMBER or the environment variable NETUID")
    return netuid


def state_folder(state: Path, *parts: str) -> Path:
    """A folder below ``state`` that can be written in, made where there is none, for its owner alone.

    Raises:
        ValueError: it cannot be: read-only, no place left, or something else stands there.
    """
    folder = state.expanduser().joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(_PROBED))
    except OSError as error:
        raise ValueError(
            f"state: nothing can be written in {folder} ({error.strerror or error}), expected --state with a folder "
            "that is not read-only and has place left"
        ) from None
    return folder


def is_another_command(context: typer.Context) -> bool:
    """Whether a command below the one of ``context`` was called, with its options behind its own name.

    Raises:
        ValueError: options stand before its name, where they would be ignored.
    """
    if context.invoked_subcommand is None:
        return False
    for parameter in context.command.params:
        source = None if parameter.name is None else context.get_parameter_source(parameter.name)
        if source is not None and source.name == "COMMANDLINE":
            raise ValueError(f"{parameter.opts[0]}: stands before {context.invoked_subcommand!r}, expected behind it")
    return True
