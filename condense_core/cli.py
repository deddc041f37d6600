"""``condense``: the command line. A command parses, calls the library and prints; nothing else lives here.

Heavy imports (torch, transformers) stand inside the commands, so that ``condense --help`` answers at once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from condense_core._version import __version__
from condense_core.cli_pruning import open_cache, prune
from condense_core.cli_quality import evaluate, train
from condense_core.options import DEFAULT_RATIO, Device, Json, Method, Model, OptionalRatio, Ratio, load_condenser
from condense_core.terminal import (
    check_output,
    console,
    decode_text,
    describe,
    holds_safetensors,
    print_json,
    read_bytes,
    read_text,
    run,
    working,
)

if TYPE_CHECKING:
    from condense_core.compressor.soft_tokens import SoftTokens

app = typer.Typer(
    name="condense",
    help="Long contexts become a few soft tokens, or a pruned KV cache, that an unmodified LLM can use.",
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
    text = read_text(file)
    check_output(output, file)
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
        str | None,
        typer.Argument(
            metavar="FILE",
            help="Text in UTF-8 or soft tokens (safetensors), or - for standard input; left out with --cache.",
            show_default=False,
        ),
    ] = None,
    question: Annotated[
        str | None, typer.Argument(metavar="QUESTION", help="What to ask about it.", show_default=False)
    ] = None,
    cache: Annotated[
        str | None, typer.Option(help="Ask a pruned cache that 'condense prune' wrote.", metavar="CACHE")
    ] = None,
    ratio: OptionalRatio = None,
    method: Method = None,
    full: Annotated[bool, typer.Option("--full", help="Give the model the whole text, without compression.")] = False,
    model: Model = None,
    device: Device = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 64,
    json: Json = False,
) -> None:
    """Ask the model about a text, about soft tokens, or about a pruned cache."""
    file, question = _file_and_question(file, question, cache)
    if not question.strip():
        raise ValueError("question: empty; expected what to ask about the text")
    if full and (ratio is not None or method is not None):
        raise ValueError("--full: gives the model the whole text; expected without --ratio and --method")
    if file is None:
        if full or ratio is not None or method is not None:
            raise ValueError("--cache: holds a context already; expected without --full, --ratio and --method")
        _ask_cache(str(cache), question, model, device, max_new_tokens, json)
        return
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


def _file_and_question(file: str | None, question: str | None, cache: str | None) -> tuple[str | None, str]:
    """What the arguments of ``ask`` are: FILE and QUESTION, or beside a cache QUESTION alone, wherever it landed."""
    if cache is not None:
        if file is None:
            raise ValueError("Missing argument 'QUESTION'; expected condense ask --cache CACHE QUESTION")
        if question is not None:
            raise ValueError("--cache: got two arguments beside it; expected the question alone, in quotes")
        return None, file
    if file is None or question is None:
        missing = "FILE" if file is None else "QUESTION"
        raise ValueError(f"Missing argument '{missing}'; expected condense ask FILE QUESTION")
    return file, question


def _ask_cache(
    path: str, question: str, model: str | None, device: str | None, max_new_tokens: int, json: bool
) -> None:
    decoder, tokenizer, cache = open_cache(path, model, device)
    from condense_core.pruning import text

    start = time.perf_counter()
    if not json:
        _print_stream(text.stream(decoder, tokenizer, cache, question, max_new_tokens=max_new_tokens))
        return
    size, ratio = cache.nbytes, cache.ratio  # before the question makes it grow
    with working("answering"):
        answer = text.ask(decoder, tokenizer, cache, question, max_new_tokens=max_new_tokens)
    print_json(
        {
            "question": question,
            "answer": answer,
            "model": cache.model_id,
            "method": cache.method,
            "ratio_achieved": round(ratio, 3),
            "context_tokens": cache.context_tokens[0],
            "cache_bytes": size,
            "milliseconds": round((time.perf_counter() - start) * 1e3, 2),
        }
    )


app.command("eval")(evaluate)
app.command()(prune)
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


def _read_context(source: str) -> str | SoftTokens:
    """The text, or the soft tokens where the name or the first bytes say safetensors."""
    data = read_bytes(source)
    if not holds_safetensors(source, data):
        return decode_text(data, source)
    if b"condense-pruned-cache" in data[: 8 + min(int.from_bytes(data[:8], "little"), len(data))]:
        raise ValueError(f"{describe(source)}: holds a pruned cache; expected condense ask --cache {source} QUESTION")
    with working("reading soft tokens"):
        from condense_core.compressor.soft_tokens import SoftTokens, SoftTokensError
    try:
        return SoftTokens.from_bytes(data)
    except SoftTokensError as error:
        raise SoftTokensError(f"{describe(source)}: {error}") from None


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
