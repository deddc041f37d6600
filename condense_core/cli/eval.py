"""``condense eval``: how well the model answers from soft tokens, or from pruned caches."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated, Any

import typer

from condense_core.cli.options import Corpus, Device, Json, Model, load_condenser, model_source, parse_ratios
from condense_core.cli.terminal import console, print_json, progress_bar
from condense_core.compressor.config import COMPRESSION_METHODS, TRAINED_METHODS

DEFAULT_RATIOS = "4,8,16"
DEFAULT_SHARES = "0.5,0.25,0.1"


def evaluate(
    corpus: Corpus = None,
    pruning: Annotated[
        bool, typer.Option("--pruning", help="Measure pruned caches, by method and kept share, not soft tokens.")
    ] = False,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated methods; with --pruning also such as 'adakv(snapkv)'.",
            show_default="those the model has, and select; with --pruning all",
        ),
    ] = None,
    ratios: Annotated[
        str | None, typer.Option(help="Comma-separated ratios of soft tokens.", show_default=DEFAULT_RATIOS)
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help="With --pruning: comma-separated kept shares.", show_default=DEFAULT_SHARES)
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="With --pruning: last tokens that score, for methods that have such a window.",
            show_default="the method's",
        ),
    ] = None,
    questions: Annotated[int, typer.Option(min=1, help="At least so many questions.")] = 100,
    questions_per_context: Annotated[int, typer.Option(min=1, help="Questions about each context.")] = 5,
    facts_per_context: Annotated[int, typer.Option(min=1, help="Facts inserted into each context.")] = 8,
    min_chars: Annotated[int, typer.Option(help="Shortest context in characters.")] = 6000,
    max_chars: Annotated[int, typer.Option(help="Longest context in characters.")] = 7000,
    seed: Annotated[int, typer.Option(help="Which contexts and questions are drawn.")] = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the report here, as JSON.")] = None,
    model: Model = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Ask about facts in running text: full context, no context, and every method at every ratio or kept share."""
    if pruning and ratios is not None:
        raise ValueError("--ratios: of soft tokens; expected --keep with --pruning")
    if not pruning and (keep is not None or window is not None):
        raise ValueError(f"--{'keep' if keep is not None else 'window'}: of pruned caches; expected with --pruning")
    wanted_ratios = parse_ratios(DEFAULT_RATIOS if ratios is None else ratios)
    shares = parse_shares(DEFAULT_SHARES if keep is None else keep)
    if output is not None and not output.absolute().parent.is_dir():
        raise ValueError(f"output: {output.parent} is not an existing folder; expected one to write {output.name} into")
    from condense_core.tasks.generators import TaskConfig

    config = TaskConfig(
        min_chars=min_chars, max_chars=max_chars, num_facts=facts_per_context, num_questions=questions_per_context
    )
    asked: dict[str, Any] = {"corpus": corpus, "num_questions": questions, "config": config, "seed": seed}
    if pruning:
        condenser, names = _pruned(model, methods, device)
    else:
        condensers = _condensers(model, methods, device)
    from condense_core.files.atomic import write_atomically
    from condense_core.tasks import report as reports

    with progress_bar("evaluating") as show:
        asked["progress"] = lambda done, total: show(done, total, "")
        if pruning:
            report = reports.run_pruning_evaluation(condenser, methods=names, shares=shares, window=window, **asked)
        else:
            report = reports.run_evaluation(condensers, ratios=wanted_ratios, **asked)
    if output is not None:
        write_atomically(output, (json_format.dumps(report, indent=1) + "\n").encode(), "the report")
    if json:
        print_json(report)
    else:
        console().print(reports.as_pruning_table(report) if pruning else reports.as_table(report))


def _pruned(model: str | None, methods: str | None, device: str | None) -> tuple[Any, list[str]]:
    """A condenser, whose compressor is not used, and the names of pruning methods, which are checked first."""
    from condense_core.pruning.build import build, methods_by_name

    names = list(methods_by_name()) if methods is None else [m.strip() for m in methods.split(",") if m.strip()]
    if not names:
        raise ValueError(f"methods: got {methods!r}, expected some of {', '.join(methods_by_name())}")
    for name in names:
        build(name, keep=1.0)
    return load_condenser(model, None, device), names


def _condensers(model: str | None, methods: str | None, device: str | None) -> dict[str, Any]:
    """One condenser per method over one decoder; by default the trained ones of the model's folder, and select."""
    if methods is None:
        folder = Path(model_source(model)) / "condense"
        wanted = [m for m in TRAINED_METHODS if (folder / m).is_dir()] + ["select"]
    else:
        wanted = [m.strip() for m in methods.split(",") if m.strip()]
        unknown = [m for m in wanted if m not in COMPRESSION_METHODS]
        if unknown or not wanted:
            raise ValueError(f"methods: got {methods!r}, expected some of {', '.join(COMPRESSION_METHODS)}")
    first = load_condenser(model, wanted[0], device)
    from condense_core.compressor.condenser import Condenser

    others = {m: Condenser(first.model, first.tokenizer, method=m) for m in wanted[1:]}
    return {wanted[0]: first, **others}


def parse_shares(text: str) -> tuple[float, ...]:
    """``"0.5,0.25"`` as (0.5, 0.25); ``ValueError`` for what is no list of shares in (0, 1]."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < share <= 1 for share in found):
        raise ValueError(f"keep: got {text!r}, expected shares in (0, 1] separated by commas, such as {DEFAULT_SHARES}")
    return found
