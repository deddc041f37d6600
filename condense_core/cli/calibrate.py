"""``condense calibrate``: what the pruning method kvzap needs for a model, from some texts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from condense_core.cli.options import Corpus, Device, Dtype, Json, Model, load_model, parse_dtype
from condense_core.cli.terminal import check_output, print_json, progress_bar, working


def calibrate(
    output: Annotated[str, typer.Option("--output", "-o", help="Where to write the surrogate (safetensors).")],
    corpus: Corpus = None,
    texts: Annotated[int, typer.Option(min=1, help="How many pieces of text to read.")] = 16,
    min_chars: Annotated[int, typer.Option(min=200, help="Shortest piece in characters.")] = 3000,
    max_chars: Annotated[int, typer.Option(min=200, help="Longest piece in characters.")] = 7000,
    seed: Annotated[int, typer.Option(help="Which pieces are drawn.")] = 0,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Fit the surrogate of KVzap: what KVzip would keep, from hidden states alone.

    Prune with it as --method 'across_layers(kvzap:FILE)': about as good as across_layers(kvzip), without its second
    reading of the text.
    """
    if min_chars > max_chars:
        raise ValueError(f"min_chars: got {min_chars}, expected at most max_chars = {max_chars}")
    check_output(output, "")
    with working("loading"):
        from condense_core.pruning.methods.fitted import save_fitted
        from condense_core.pruning.surrogate import fit
        from condense_core.tasks.generators import TaskConfig, make_tasks
        from condense_core.tasks.sources import open_source

        source = open_source(corpus)
    decoder, tokenizer = load_model(model, device, parse_dtype(dtype))
    # Facts among the text, since plain prose has few of the names and numbers that are asked for.
    shape = TaskConfig(
        min_chars=min_chars,
        max_chars=max_chars,
        num_facts=max(1, min_chars // 500),
        num_questions=1,
        wording="varied",
        split="train",
    )
    contexts = (task.context for task in make_tasks("question", source, texts, seed=seed, config=shape))
    start = time.perf_counter()
    with progress_bar("calibrating") as show:
        surrogate = fit(decoder, tokenizer, contexts, progress=lambda done: show(done, texts, ""))
    save_fitted("kvzap", surrogate, output)
    result = {
        "output": output,
        "shape": list(surrogate.shape),
        "bytes": Path(output).stat().st_size,
        "seconds": round(time.perf_counter() - start, 1),
    }
    if json:
        print_json(result)
    else:
        print(f"{output}: prune with --method 'across_layers(kvzap:{output})' ({result['seconds']} s)")
