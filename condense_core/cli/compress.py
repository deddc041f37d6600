"""``condense compress``: a text becomes a file of soft tokens."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from condense_core.cli.options import DEFAULT_RATIO, Compressor, Device, Json, Method, Model, Ratio, load_condenser
from condense_core.cli.terminal import check_output, print_json, read_text, working


def compress(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Text file in UTF-8, or - for standard input.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Where to write the soft tokens (safetensors).")],
    ratio: Ratio = DEFAULT_RATIO,
    method: Method = None,
    compressor: Compressor = None,
    model: Model = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Compress a text into a file of soft tokens."""
    text = read_text(file)
    check_output(output, file)
    condenser = load_condenser(model, method, device, compressor)
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
