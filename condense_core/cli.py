"""``condense``: the command line. A command parses, calls the library and prints; nothing else lives here.

Heavy imports (torch, transformers) stand inside the commands, so that ``condense --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from condense_core._version import __version__
from condense_core.cli_quality import evaluate, train
from condense_core.options import DEFAULT_RATIO, Device, Json, Method, Model, OptionalRatio, Ratio, load_condenser
from condense_core.terminal import console, decode_text, describe, print_json, read_bytes, run, working

if TYPE_CHECKING:
    from condense_core.compressor.soft_tokens import SoftTokens

app = typer.Typer(
    name="condense",
    help="Long contexts become a few soft tokens that an unmodified LLM can use.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"condense {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def compress(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Text file in UTF-8, or - for standard input.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Where to write the soft tokens (safetensors).")],
    ratio: Ratio = DEFAULT_RATIO,
    method: Method = None,
    model: Model = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Compress a text into a file of soft tokens."""
    text = _read_text(file)
    _check_output(output, file)
    condenser = load_condenser(model, method, device)
    with working("compressing"):
        start = time.perf_counter()
        soft = condenser.compress(text, ratio)
        soft.check_finite()  # waits for the device: the time below is of finished work
        milliseconds = (time.perf_counter() - start) * 1e3
    soft.save(output)
    result: dict[str, Any] = {
        "output": output,
        "context_chars": len(text),
        "context_tokens": soft.num_context_tokens,
        "soft_tokens": len(soft),
        "ratio": ratio,
        "ratio_achieved": round(soft.num_context_tokens / len(soft), 3),
        "method": soft.method,
        "model": soft.model_id,
        "bytes": Path(output).stat().st_size,
        "compress_ms": round(milliseconds, 2),
    }
    if json:
        print_json(result)
        return
    print(
        f"{output}: {result['context_chars']:,} characters, {result['context_tokens']:,} tokens -> "
        f"{result['soft_tokens']:,} soft tokens ({result['ratio_achieved']:.2f}x, {soft.method}), "
        f"{result['bytes']:,} bytes, {milliseconds:.0f} ms"
    )


@app.command()
def ask(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="Text in UTF-8 or soft tokens (safetensors), or - for standard input.")
    ],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask about it.")],
    ratio: OptionalRatio = None,
    method: Method = None,
    full: Annotated[bool, typer.Option("--full", help="Give the model the whole text, without compression.")] = False,
    model: Model = None,
    device: Device = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 64,
    json: Json = False,
) -> None:
    """Ask the model about a text or about soft tokens."""
    if not question.strip():
        raise ValueError("question: empty; expected what to ask about the text")
    if full and (ratio is not None or method is not None):
        raise ValueError("--full: gives the model the whole text; expected without --ratio and --method")
    given = _read_context(file)
    if not isinstance(given, str) and (full or ratio is not None or method is not None):
        raise ValueError(f"{describe(file)}: holds soft tokens; expected without --full, --ratio and --method")
    condenser = load_condenser(model, method, device)
    start = time.perf_counter()
    context = condenser.compress(given, ratio or DEFAULT_RATIO) if isinstance(given, str) and not full else given
    if not json:
        _print_stream(condenser.stream(context, question, max_new_tokens=max_new_tokens))
        return
    with working("answering"):
        answer = condenser.generate(context, question, max_new_tokens=max_new_tokens)
    soft = None if isinstance(context, str) else context
    print_json(
        {
            "question": question,
            "answer": answer,
            "model": condenser.model_id,
            "method": soft.method if soft else None,
            "ratio": soft.ratio if soft else None,
            "context_tokens": soft.num_context_tokens if soft else len(condenser.encode(str(context))),
            "soft_tokens": len(soft) if soft else None,
            "milliseconds": round((time.perf_counter() - start) * 1e3, 2),
        }
    )


app.command("eval")(evaluate)
app.command()(train)


@app.command()
def doctor(json: Json = False) -> None:
    """Show versions, devices, optional extras and the backends of every op, and why one is missing."""
    from condense_core.doctor import examine, render

    with working("looking around"):
        report = examine()
    if json:
        print_json(report)
    else:
        render(report, console())


@app.command()
def demo(model: Model = None, method: Method = None, device: Device = None, json: Json = False) -> None:
    """Compress a text of 6,700 characters, time it, and ask questions with and without compression."""
    condenser = load_condenser(model, method, device)
    from condense_core.demo import render, run_demo

    with working("measuring and answering"):
        report = run_demo(condenser)
    if json:
        print_json(report.to_json())
    else:
        render(report, console())


def _read_text(source: str) -> str:
    data = read_bytes(source)
    if _holds_soft_tokens(source, data):
        raise ValueError(f"{describe(source)}: holds safetensors; expected a text file in UTF-8")
    return decode_text(data, source)


def _read_context(source: str) -> str | SoftTokens:
    """The text, or the soft tokens where the name or the first bytes say safetensors."""
    data = read_bytes(source)
    if not _holds_soft_tokens(source, data):
        return decode_text(data, source)
    with working("reading soft tokens"):
        from condense_core.compressor.soft_tokens import SoftTokens, SoftTokensError
    try:
        return SoftTokens.from_bytes(data)
    except SoftTokensError as error:
        raise SoftTokensError(f"{describe(source)}: {error}") from None


def _holds_soft_tokens(source: str, data: bytes) -> bool:
    """Safetensors by name, or by content: an 8-byte length, far below what eight characters of text spell, then '{'."""
    return source.endswith(".safetensors") or (data[8:9] == b"{" and int.from_bytes(data[:8], "little") < 2**32)


def _check_output(output: str, source: str) -> None:
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


def _print_stream(pieces: Iterator[str]) -> None:
    """Print pieces as they come, without white space around the whole; what was begun ends with its line."""
    pending, begun, complete = "", False, False
    try:
        for piece in pieces:
            text = pending + piece if begun else piece.lstrip()
            shown = text.rstrip()
            pending = text[len(shown) :]  # white space inside the answer, if more follows
            begun = begun or bool(shown)
            print(shown, end="", flush=True)
        complete = True
    finally:
        if begun or complete:
            print(flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``condense``; returns the exit code."""
    return run(app, argv, name="condense")


if __name__ == "__main__":
    sys.exit(main())
