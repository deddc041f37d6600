"""``condense prune``: a text is read once into a pruned KV cache, which is written to a file."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from condense_core.cli.options import Device, Json, Model, TemplateArg, load_model, parse_template_args
from condense_core.cli.remote import Server, Timeout, asking, check_options
from condense_core.cli.terminal import check_output, print_json, read_text, working

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from condense_core.pruning.cache import PrunedCache

DEFAULT_KEEP = 0.25


def list_methods(wanted: bool) -> None:
    """Print the methods and wrappers that a name is enough for, and exit; an option's callback.

    The help does not name them: they register themselves when they are imported, and with them torch.
    """
    if not wanted:
        return
    with working("loading"):
        from condense_core.pruning import METHODS, WRAPPERS
        from condense_core.pruning.build import methods_by_name, wrappers_by_name
    calibrated = sorted(name for name, kind in METHODS.items() if kind.needs)
    for title, names, registry in (
        ("methods", methods_by_name(), METHODS),
        ("methods with a file made once for the model, as kvzap:FILE (condense calibrate)", calibrated, METHODS),
        ("wrappers, around a method as in adakv(snapkv)", wrappers_by_name(), WRAPPERS),
    ):
        print(f"{title}:")
        for name in names:
            print(f"  {name:<20}{registry[name].summary}")
    raise typer.Exit


def prune(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Text file in UTF-8, or - for standard input.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Where to write the cache (safetensors).")],
    method: Annotated[
        str,
        typer.Option(help="What decides what stays, such as snapkv, kvzip or 'adakv(snapkv)': see --list-methods."),
    ] = "snapkv",
    keep: Annotated[
        float | None,
        typer.Option(help="Share of the tokens that stays, in (0, 1].", show_default=str(DEFAULT_KEEP)),
    ] = None,
    budget: Annotated[int | None, typer.Option(help="Instead of --keep, how many tokens stay.")] = None,
    wrap: Annotated[
        str | None, typer.Option(help="Wrappers around the method, the outermost first, such as adakv,criticalkv.")
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(help="Last tokens that score, for methods that have such a window.", show_default="the method's"),
    ] = None,
    question: Annotated[
        str | None, typer.Option(help="Keep what this question needs, which is to be asked later.", metavar="TEXT")
    ] = None,
    chunk_size: Annotated[
        int | None, typer.Option(help="Read and prune so many tokens at a time.", show_default="all at once")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="Hold what stays in 8 bits: int8 or fp8.", show_default="the model's dtype")
    ] = None,
    list_: Annotated[
        bool,
        typer.Option(
            "--list-methods", is_eager=True, callback=list_methods, help="List methods and wrappers and exit."
        ),
    ] = False,
    template_arg: TemplateArg = None,
    model: Model = None,
    device: Device = None,
    server: Server = None,
    timeout: Timeout = None,
    json: Json = False,
) -> None:
    """Let the model read a text once, and write what a method keeps of its KV cache into a file."""
    if storage not in (None, "int8", "fp8"):
        raise ValueError(f"storage: got {storage!r}, expected int8 or fp8")
    if question is not None and not question.strip():
        raise ValueError("question: empty; expected what will be asked about the text")
    own = {"model": model, "device": device, "window": window, "chunk_size": chunk_size, "template_arg": template_arg}
    check_options(server, timeout, **own)
    template_args = parse_template_args(template_arg)
    text = read_text(file)
    check_output(output, file)
    spec = method
    for wrapper in reversed([name.strip() for name in wrap.split(",")] if wrap is not None else []):
        spec = f"{wrapper}({spec})"
    if server is not None:
        with asking(server, timeout) as client:
            start = time.perf_counter()
            cache = client.prune(
                text,
                method=spec,
                keep=keep,
                budget=budget,
                question=question,
                storage=storage,
                folder=Path(output).parent,
            )
            milliseconds = (time.perf_counter() - start) * 1e3
        kept = _mean_held(cache)
        cache.save(output)
        _show(cache, kept, text, output, storage, milliseconds, json=json)
        return
    with working("loading"):
        from condense_core.pruning.build import build, fitting_keep
        from condense_core.pruning.text import context_ids, prefill, question_ids

    how: dict[str, Any] = {"keep": DEFAULT_KEEP if keep is None and budget is None else keep, "budget": budget}
    build(spec, window=window, **how)  # a mistake shows before the model is loaded
    decoder, tokenizer = load_model(model, device)
    ids = None if question is None else question_ids(tokenizer, question, template_args)
    if keep is None and budget is None and window is None:
        how["keep"] = fitting_keep(spec, DEFAULT_KEEP, len(context_ids(decoder, tokenizer, text, template_args)), ids)
    with working("pruning"):
        start = time.perf_counter()
        cache = prefill(
            decoder,
            tokenizer,
            text,
            build(spec, window=window, question_ids=ids, **how),
            chunk_size=chunk_size,
            template_args=template_args,
        )
        if storage is not None:
            cache.quantize(storage)
        _wait_for(decoder)
        milliseconds = (time.perf_counter() - start) * 1e3
        kept = _mean_held(cache)
        cache.save(output)
    _show(cache, kept, text, output, storage, milliseconds, json=json)


def _show(
    cache: PrunedCache, kept: float, text: str, output: str, storage: str | None, milliseconds: float, *, json: bool
) -> None:
    """Print what became of the text; kept: tokens that a head holds."""
    result: dict[str, Any] = {
        "output": output,
        "context_chars": len(text),
        "context_tokens": cache.context_tokens[0],
        "kept_tokens": round(kept, 2),
        "kept_share": round(kept / cache.context_tokens[0], 4),
        "ratio_achieved": round(cache.ratio, 3),
        "method": cache.method,
        "storage": storage,
        "model": cache.model_id,
        "full_bytes": cache.full_nbytes,
        "cache_bytes": cache.nbytes,
        "bytes": Path(output).stat().st_size,
        "prune_ms": round(milliseconds, 2),
    }
    if json:
        print_json(result)
        return
    shown = re.sub(r", question_ids=\([^)]*\)", "", cache.method)  # the user gave it as text
    print(
        f"{output}: {len(text):,} characters, {result['context_tokens']:,} tokens -> {kept:,.0f} kept per head "
        f"({result['kept_share']:.1%}, {shown}), {result['cache_bytes']:,} bytes instead of "
        f"{result['full_bytes']:,} ({cache.ratio:.2f}x), {milliseconds:.0f} ms"
    )


def _mean_held(cache: PrunedCache) -> float:
    """Tokens that a head holds, on average over heads and layers."""
    from condense_core.pruning.ragged import RaggedLayer

    held = [
        float(layer.lengths.float().mean()) if isinstance(layer, RaggedLayer) else layer.held for layer in cache.layers
    ]
    return sum(held) / len(held)


def _wait_for(model: PreTrainedModel) -> None:
    import torch

    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
