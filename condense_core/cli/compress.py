"""``condense compress``: a text becomes a file of soft tokens."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from condense_core.cli.options import (
    DEFAULT_RATIO,
    Compressor,
    Device,
    EncoderWeights,
    Json,
    Method,
    Model,
    Ratio,
    load_condenser,
)
from condense_core.cli.remote import Server, Timeout, asking, check_options
from condense_core.cli.terminal import check_output, print_json, read_text, working
from condense_core.files.atomic import write_atomically


def compress(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Text file in UTF-8, or - for standard input.")],
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", help="Where to write the soft tokens (safetensors), or with --as-text the text."
        ),
    ] = None,
    ratio: Ratio = DEFAULT_RATIO,
    method: Method = None,
    question: Annotated[
        str | None,
        typer.Option(help="What will be asked: select keeps what bears on it.", show_default="keep what is unusual"),
    ] = None,
    as_text: Annotated[
        bool,
        typer.Option("--as-text", help="Give what select keeps as text, for LLMs behind an API; printed without -o."),
    ] = False,
    compressor: Compressor = None,
    encoder_weights: EncoderWeights = None,
    model: Model = None,
    device: Device = None,
    server: Server = None,
    timeout: Timeout = None,
    json: Json = False,
) -> None:
    """Compress a text into a file of soft tokens, or with --as-text into a shorter text."""
    if output is None and not as_text:
        raise ValueError("Missing option '--output' / '-o'; expected where to write the soft tokens, or --as-text")
    check_options(server, timeout, model=model, device=device, compressor=compressor)
    if method is None and compressor is None and (as_text or question is not None):
        method = "select"
    text = read_text(file)
    if output is not None:
        check_output(output, file)
    if server is None:
        condenser = load_condenser(model, method, device, compressor, encoder_weights=encoder_weights)
        _check_as_text(as_text, condenser.config.method)
        with working("compressing"):
            start = time.perf_counter()
            soft = condenser.compress(text, ratio, question=question)
            soft.check_finite()  # waits for the device: the time below is of finished work
    else:
        _check_as_text(as_text, method)
        with asking(server, timeout) as client:
            start = time.perf_counter()
            soft = client.compress(text, ratio=ratio, method=method, question=question)
    milliseconds = (time.perf_counter() - start) * 1e3
    if output is not None:
        if as_text:
            write_atomically(output, f"{soft.text}\n".encode(), "the text")
        else:
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
        "bytes": None if output is None else Path(output).stat().st_size,
        "compress_ms": round(milliseconds, 2),
    }
    if question is not None:
        result["question"] = question
    if as_text:
        result |= {"text": soft.text, "text_chars": len(soft.text)}
    if json:
        print_json(result)
        return
    if output is None:
        print(soft.text)
        return
    what = "tokens" if as_text else "soft tokens"
    print(
        f"{output}: {result['context_chars']:,} characters, {result['context_tokens']:,} tokens -> "
        f"{result['soft_tokens']:,} {what} ({result['ratio_achieved']:.2f}x, {soft.method}), "
        f"{result['bytes']:,} bytes, {milliseconds:.0f} ms"
    )


def _check_as_text(as_text: bool, method: str | None) -> None:
    if as_text and method != "select":
        raise ValueError(f"--as-text: the method {method!r} keeps no text, expected the method 'select'")
