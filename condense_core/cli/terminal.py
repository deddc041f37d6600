"""What the commands share: one-line errors and exit codes, reading text, spinners and JSON on the terminal."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from condense_core.files.text import decode_text

if TYPE_CHECKING:
    from rich.console import Console

STDIN = "-"
MAX_INPUT_BYTES = 256 * 2**20
"""Largest input read: a device such as /dev/zero must end in an error, not in swap."""

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE
_PIPED_WIDTH = 120

# What bad input raises. Anything else is a bug of ours and keeps its traceback.
_EXPECTED = (ValueError, TypeError, OSError, ImportError, MemoryError)


def run(app: typer.Typer, argv: Sequence[str] | None = None, *, name: str) -> int:
    """Run ``app`` and return its exit code; bad input of any kind becomes one line on stderr and the code 2."""
    _never_fail_to_print(sys.stdout)
    command = typer.main.get_command(app)
    try:
        with command.make_context(name, list(sys.argv[1:] if argv is None else argv)) as context:
            command.invoke(context)
        sys.stdout.flush()  # a full disk shows here, not at interpreter exit
        return 0
    except typer.Exit as end:
        return end.exit_code
    except (KeyboardInterrupt, typer.Abort):
        print("error: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _discard_stdout()
        return EXIT_BROKEN_PIPE
    except Exception as error:
        if not _is_bad_input(error):
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        _discard_if_full()
        return EXIT_BAD_INPUT


def one_line(error: BaseException) -> str:
    """The message of ``error`` in one printable line."""
    if hasattr(error, "format_message"):  # a usage error of the command line parser
        message = error.format_message().rstrip(".")
        context = getattr(error, "ctx", None)
        message += f" (see '{context.command_path} --help')" if context is not None else ""
    elif isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        message = f"out of memory: {error}" if str(error) else "out of memory"
    else:
        message = str(error) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))


def read_bytes(source: str) -> bytes:
    """The bytes of a file or, for ``-``, of standard input; ``ValueError`` beyond ``MAX_INPUT_BYTES``."""
    with contextlib.nullcontext(sys.stdin.buffer) if source == STDIN else Path(source).open("rb") as file:
        data = file.read(MAX_INPUT_BYTES + 1)
    if len(data) > MAX_INPUT_BYTES:
        raise ValueError(f"{describe(source)}: more than {MAX_INPUT_BYTES:,} bytes, expected at most that many")
    return data


def read_text(source: str) -> str:
    """The text of a file or, for ``-``, of standard input; ``ValueError`` for safetensors and for what is no text."""
    data = read_bytes(source)
    if holds_safetensors(source, data):
        raise ValueError(f"{describe(source)}: holds safetensors; expected a text file in UTF-8")
    return decode_text(data, describe(source))


def holds_safetensors(source: str, data: bytes) -> bool:
    """Safetensors by name, or by content: an 8-byte length, far below what eight characters of text spell, then '{'."""
    return source.endswith(".safetensors") or (data[8:9] == b"{" and int.from_bytes(data[:8], "little") < 2**32)


def check_output(output: str, source: str) -> None:
    """Refuse early what cannot be written; the write itself checks again."""
    path, folder = Path(output), Path(output).parent
    if output in ("", "-"):
        raise ValueError(f"output: got {output!r}, expected the path of a file to write")
    if not folder.is_dir():
        raise ValueError(f"output: {folder} is not an existing folder; expected one to write {path.name} into")
    if path.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"output: cannot write {path}; expected a file in a folder open for writing")
    if path.exists() and Path(source).exists() and path.samefile(source):
        raise ValueError(f"output: {path} is the text itself; expected another file")


def describe(source: str) -> str:
    """What to call ``source`` in a message."""
    return "standard input" if source == STDIN else source


@contextlib.contextmanager
def working(message: str) -> Iterator[None]:
    """Show a spinner on stderr while the body runs; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(f"{message} ..."):
        yield


@contextlib.contextmanager
def extra_missing(extra: str) -> Iterator[None]:
    """Around imports of optional packages: where one is missing, the ``ImportError`` names the extra that has it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("condense_core"):
            raise
        raise ImportError(
            f"this needs the package {error.name.partition('.')[0]}, expected pip install 'condense-core[{extra}]'"
        ) from error


def console() -> Console:
    """A console for tables on stdout: as wide as the terminal, or wide enough for the tables when piped."""
    from rich.console import Console

    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=_PIPED_WIDTH if piped else None, highlight=False)


def print_json(value: Any) -> None:
    """Print ``value`` as one JSON document on stdout."""
    print(json.dumps(value, indent=2))


def _is_bad_input(error: Exception) -> bool:
    return (
        isinstance(error, _EXPECTED) or hasattr(error, "format_message") or type(error).__name__ == "OutOfMemoryError"
    )


def _never_fail_to_print(stream: Any) -> None:
    """Characters that the terminal's encoding lacks become '?'."""
    with contextlib.suppress(AttributeError, ValueError):
        stream.reconfigure(errors="replace")


def _discard_stdout() -> None:
    """Point stdout to nowhere, so that the flush at interpreter exit does not fail again."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _discard_if_full() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        _discard_stdout()


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Any]:
    """A progress bar on stderr: yields ``show(done, total, line)``; nothing is shown where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total, line: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[line]}"), console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=None, line="")
        yield lambda done, total, line: progress.update(task, completed=done, total=total, line=line)
