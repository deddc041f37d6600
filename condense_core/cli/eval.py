"""``condense eval``: how well the model answers from soft tokens, or from pruned caches."""

from __future__ import annotations

import json as json_format
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from condense_core.cli.options import (
    Corpus,
    Device,
    Dtype,
    EncoderWeights,
    Json,
    Model,
    Squad,
    TemplateArg,
    load_condenser,
    model_source,
    parse_ratios,
    parse_template_args,
)
from condense_core.cli.terminal import console, print_json, progress_bar
from condense_core.compressor.config import COMPRESSION_METHODS, TRAINED_METHODS

WITH_QUESTION = "+question"  # as tasks.evaluate, which is not loaded before it is used
SELECT_WITH_QUESTION = f"select{WITH_QUESTION}"
DEFAULT_RATIOS = "4,8,16"
DEFAULT_SHARES = "0.5,0.25,0.1"
DEFAULT_FACTS = 8


def evaluate(
    corpus: Corpus = None,
    squad: Squad = None,
    pruning: Annotated[
        bool, typer.Option("--pruning", help="Measure pruned caches, by method and kept share, not soft tokens.")
    ] = False,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated methods, such as 'pool,select+question'; with --pruning also 'adakv(snapkv)'.",
            show_default="those the model has, select and select+question; with --pruning all",
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
    questions_per_context: Annotated[
        int | None, typer.Option(min=1, help="Questions about each context.", show_default="5; with --squad 10")
    ] = None,
    facts_per_context: Annotated[
        int | None, typer.Option(min=1, help="Facts inserted into each context.", show_default=str(DEFAULT_FACTS))
    ] = None,
    wording: Annotated[
        str | None,
        typer.Option(
            help="Of the facts: plain (what the embedded model was trained on), or varied.", show_default="plain"
        ),
    ] = None,
    min_chars: Annotated[int, typer.Option(help="Shortest context in characters.")] = 6000,
    max_chars: Annotated[int, typer.Option(help="Longest context in characters.")] = 7000,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Longest answer in tokens.", show_default="48 with a chat template, else 16"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Which contexts and questions are drawn.")] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the report here, as JSON, while it grows.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw quality over compression into this file.", metavar="FILE.png")
    ] = None,
    compressor: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder of a trained compressor, as 'condense train' writes OUT/checkpoint; may be repeated.",
            show_default="the model folder's own",
            metavar="FOLDER",
        ),
    ] = None,
    encoder_weights: EncoderWeights = None,
    template_arg: TemplateArg = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Ask about facts in running text, or what --squad holds: full context, none, every method at every ratio or share.

    contained: answers in which the expected value stands; exact match: answers that are nothing else. An evaluation
    that is cut off shows, and leaves in the file of -o, what was measured.
    """
    for name, given in (("ratios", ratios), ("compressor", compressor), ("encoder-weights", encoder_weights)):
        if pruning and given:
            raise ValueError(f"--{name}: of soft tokens; expected --keep with --pruning")
    for name, value in (("keep", keep), ("window", window)):
        if not pruning and value is not None:
            raise ValueError(f"--{name}: of pruned caches; expected with --pruning")
    template_args = parse_template_args(template_arg)
    wanted_ratios = parse_ratios(DEFAULT_RATIOS if ratios is None else ratios)
    shares = parse_shares(DEFAULT_SHARES if keep is None else keep)
    if output is not None and not output.absolute().parent.is_dir():
        raise ValueError(f"output: {output.parent} is not an existing folder; expected one to write {output.name} into")
    if plot is not None:
        from condense_core.tasks.plot import check_picture

        check_picture(plot)
    config = _config(
        squad,
        {"min_chars": min_chars, "max_chars": max_chars, "num_questions": questions_per_context},
        {"corpus": corpus, "facts_per_context": facts_per_context, "wording": wording},
    )
    asked: dict[str, Any] = {
        "corpus": corpus if squad is None else squad,
        "num_questions": questions,
        "config": config,
        "seed": seed,
    }
    asked["max_new_tokens"] = max_new_tokens
    if pruning:
        condenser, names = _pruned(model, methods, device, dtype, template_args)
    else:
        condensers = _condensers(model, methods, compressor or [], device, dtype, template_args, encoder_weights)
    from condense_core.tasks import report as reports

    growing = _Growing(output)
    try:
        with progress_bar("evaluating") as show:
            asked |= {"progress": lambda done, total: show(done, total, ""), "on_report": growing.keep}
            if pruning:
                reports.run_pruning_evaluation(condenser, methods=names, shares=shares, window=window, **asked)
            else:
                reports.run_evaluation(condensers, ratios=wanted_ratios, **asked)
    finally:
        if report := growing.report:
            if json:
                print_json(report)
            else:
                console().print(reports.as_pruning_table(report) if pruning else reports.as_table(report))
    if plot is not None:
        from condense_core.tasks.plot import plot_reports

        plot_reports([growing.report or {}], plot)


def _config(squad: Path | None, shape: dict[str, Any], of_facts: dict[str, Any]) -> Any:
    """What the contexts and questions are like; ``shape``: of both tasks, ``of_facts``: of inserted facts alone."""
    from condense_core.tasks.generators import TaskConfig
    from condense_core.tasks.squad import SquadConfig

    given = {name: value for name, value in shape.items() if value is not None}
    if squad is not None:
        for name, value in of_facts.items():
            if value is not None:
                raise ValueError(f"--{name.replace('_', '-')}: of inserted facts; expected --squad without it")
        return SquadConfig(**given)
    facts = of_facts["facts_per_context"] or DEFAULT_FACTS
    return TaskConfig(num_facts=facts, wording=of_facts["wording"] or "plain", **({"num_questions": 5} | given))


class _Growing:
    """The report as far as it is known; ``output`` holds the same at any moment, or what it held before."""

    def __init__(self, output: Path | None) -> None:
        self.output = output
        self.report: dict[str, Any] | None = None

    def keep(self, report: dict[str, Any]) -> None:
        from condense_core.files.atomic import write_atomically

        self.report = report
        if self.output is not None:
            write_atomically(self.output, (json_format.dumps(report, indent=1) + "\n").encode(), "the report")


def _pruned(
    model: str | None, methods: str | None, device: str | None, dtype: str | None, template_args: dict[str, Any]
) -> tuple[Any, list[str]]:
    """A condenser, whose compressor is not used, and the names of pruning methods, which are checked first."""
    from condense_core.pruning.build import methods_by_name
    from condense_core.tasks.pruning import check_method

    names = list(methods_by_name()) if methods is None else [m.strip() for m in methods.split(",") if m.strip()]
    if not names:
        raise ValueError(f"methods: got {methods!r}, expected some of {', '.join(methods_by_name())}")
    for name in names:
        check_method(name)
    return load_condenser(model, None, device, template_args=template_args, dtype=dtype), names


def _condensers(
    model: str | None,
    methods: str | None,
    compressors: Sequence[str],
    device: str | None,
    dtype: str | None,
    template_args: dict[str, Any],
    encoder_weights: str | None,
) -> dict[str, Any]:
    """One condenser for each row's name, over one decoder: the ``compressors``, then the ``methods``.

    By default, where there is neither: the trained compressors of the model's folder, and select without and with the
    question.
    """
    if methods is not None:
        wanted = [m.strip() for m in methods.split(",") if m.strip()]
        if not wanted or not set(wanted) <= {*COMPRESSION_METHODS, SELECT_WITH_QUESTION}:
            names = ", ".join((*COMPRESSION_METHODS, SELECT_WITH_QUESTION))
            raise ValueError(f"methods: got {methods!r}, expected some of {names}")
    elif compressors:
        wanted = []
    else:
        folder = Path(model_source(model)) / "condense"
        wanted = [m for m in TRAINED_METHODS if (folder / m).is_dir()]
        wanted += ["select", SELECT_WITH_QUESTION]
    method_of = {m: m.removesuffix(WITH_QUESTION) for m in wanted}
    method = method_of[wanted[0]] if wanted else "select"
    shared: dict[str, Any] = {"template_args": template_args, "encoder_weights": encoder_weights}
    first = load_condenser(model, method, device, dtype=dtype, **shared)
    from condense_core.compressor.condenser import Condenser

    def another(**which: Any) -> Condenser:
        return Condenser(first.model, first.tokenizer, **shared, **which)

    named = {path: another(compressor=path) for path in dict.fromkeys(compressors)}
    made = {m: another(method=m) for m in dict.fromkeys(method_of.values()) if m != first.config.method}
    own = {m: made.get(method, first) for m, method in method_of.items()}
    taken = [*own, *(condenser.config.method for condenser in named.values())]
    return {
        condenser.config.method if taken.count(condenser.config.method) == 1 else path: condenser
        for path, condenser in named.items()
    } | own


def parse_shares(text: str) -> tuple[float, ...]:
    """``"0.5,0.25"`` as (0.5, 0.25); ``ValueError`` for what is no list of shares in (0, 1]."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < share <= 1 for share in found):
        raise ValueError(f"keep: got {text!r}, expected shares in (0, 1] separated by commas, such as {DEFAULT_SHARES}")
    return found
