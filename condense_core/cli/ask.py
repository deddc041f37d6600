"""``condense ask``: a question about a text, about soft tokens, or about a pruned cache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from condense_core.cli.options import (
    DEFAULT_RATIO,
    Compressor,
    Device,
    Json,
    Method,
    Model,
    OptionalRatio,
    TemplateArg,
    load_condenser,
    load_model,
    parse_template_args,
)
from condense_core.cli.terminal import describe, holds_safetensors, print_json, read_bytes, working
from condense_core.files.text import decode_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from condense_core.compressor.soft_tokens import SoftTokens
    from condense_core.pruning.cache import PrunedCache


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
    compressor: Compressor = None,
    full: Annotated[bool, typer.Option("--full", help="Give the model the whole text, without compression.")] = False,
    model: Model = None,
    device: Device = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 64,
    template_arg: TemplateArg = None,
    json: Json = False,
) -> None:
    """Ask the model about a text, about soft tokens, or about a pruned cache."""
    file, question = _file_and_question(file, question, cache)
    if not question.strip():
        raise ValueError("question: empty; expected what to ask about the text")
    template_args = parse_template_args(template_arg)
    compresses = any(option is not None for option in (ratio, method, compressor))
    if full and compresses:
        raise ValueError("--full: gives the model the whole text; expected without --ratio, --method and --compressor")
    if file is None:
        if full or compresses:
            raise ValueError(
                "--cache: holds a context already; expected without --full, --ratio, --method and --compressor"
            )
        _ask_cache(str(cache), question, model, device, template_args, max_new_tokens, json)
        return
    given = _read_context(file)
    if not isinstance(given, str) and (full or compresses):
        raise ValueError(
            f"{describe(file)}: holds soft tokens; expected without --full, --ratio, --method and --compressor"
        )
    condenser = load_condenser(model, method, device, compressor, template_args)
    start = time.perf_counter()
    context = given
    if isinstance(given, str) and not full:
        asked = question if condenser.config.method == "select" else None
        context = condenser.compress(given, ratio or DEFAULT_RATIO, question=asked)
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
    path: str,
    question: str,
    model: str | None,
    device: str | None,
    template_args: dict[str, Any],
    max_new_tokens: int,
    json: bool,
) -> None:
    decoder, tokenizer, cache = open_cache(path, model, device)
    from condense_core.pruning import text

    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "template_args": template_args}

    start = time.perf_counter()
    if not json:
        _print_stream(text.stream(decoder, tokenizer, cache, question, **settings))
        return
    size, ratio = cache.nbytes, cache.ratio  # before the question makes it grow
    with working("answering"):
        answer = text.ask(decoder, tokenizer, cache, question, **settings)
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


def open_cache(
    path: str, model: str | None, device: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, PrunedCache]:
    """The cache in a file and the model that it is of, in the cache's dtype; ``ValueError`` if that is another one."""
    with working("reading the cache"):
        from condense_core.pruning.cache import PrunedCache

        cache = PrunedCache.load(path)
    layer: Any = cache.layers[0]
    decoder, tokenizer = load_model(model, device, layer.dtype)
    try:
        cache.check_model(decoder)
    except ValueError as error:
        reason = str(error).removeprefix("cache: ")
        maker = "" if "made by" in reason else f" (it was made by {cache.model_id!r})"
        raise ValueError(f"{path}: {reason}{maker}; --model names another model") from None
    return decoder, tokenizer, cache.to(decoder.device)


def _read_context(source: str) -> str | SoftTokens:
    """The text, or the soft tokens where the name or the first bytes say safetensors."""
    data = read_bytes(source)
    if not holds_safetensors(source, data):
        return decode_text(data, describe(source))
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
