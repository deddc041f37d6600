"""The commands that measure and train compressors: ``condense eval`` and ``condense train``."""

from __future__ import annotations

import json as json_format
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from condense_core.compressor.config import METHODS, TRAINED_METHODS, check_ratio
from condense_core.options import Device, Json, Model, load_condenser, model_source, quiet_libraries
from condense_core.terminal import console, print_json

DEFAULT_RATIOS = "4,8,16"
DEFAULT_SHARES = "0.5,0.25,0.1"

Corpus = Annotated[
    str | None,
    typer.Option(help="Text: a folder, a text or .jsonl(.xz) file, or dataset:NAME.", show_default="built-in prose"),
]


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
    from condense_core.files import write_atomically
    from condense_core.tasks import report as reports

    with _bar("evaluating") as show:
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
        unknown = [m for m in wanted if m not in METHODS]
        if unknown or not wanted:
            raise ValueError(f"methods: got {methods!r}, expected some of {', '.join(METHODS)}")
    first = load_condenser(model, wanted[0], device)
    from condense_core.compressor.condenser import Condenser

    others = {m: Condenser(first.model, first.tokenizer, method=m) for m in wanted[1:]}
    return {wanted[0]: first, **others}


def train(
    out: Annotated[Path, typer.Option(help="Folder of the run: resumable state, log, checkpoint.")],
    model: Model = None,
    corpus: Corpus = None,
    eval_corpus: Corpus = None,
    method: Annotated[str, typer.Option(help=f"What to train: {', '.join(TRAINED_METHODS)}.")] = "pool",
    ratios: Annotated[str, typer.Option(help="Comma-separated ratios that the checkpoint will serve.")] = "2,4,8,16",
    encoder_layers: Annotated[
        int | None,
        typer.Option(
            min=0, help="First layers of the LLM that read the context.", show_default="8, or half of a smaller LLM's"
        ),
    ] = None,
    lora_rank: Annotated[int, typer.Option(min=0, help="Rank of the encoder's adapter, 0 for none.")] = 32,
    halo: Annotated[int, typer.Option(min=0, help="Tokens a window also sees on either side (pool).")] = 0,
    bidirectional: Annotated[bool, typer.Option("--bidirectional", help="Let the encoder look both ways.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 20000,
    tokens: Annotated[int, typer.Option(min=64, help="Tokens per step and process.")] = 16384,
    min_context: Annotated[int, typer.Option(min=64, help="Shortest context in tokens.")] = 256,
    max_context: Annotated[int, typer.Option(min=64, help="Longest context in tokens.")] = 2048,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-4,
    reconstruction: Annotated[float, typer.Option(min=0, max=1, help="Share of reconstruction batches.")] = 0.2,
    continuation: Annotated[float, typer.Option(min=0, max=1, help="Share of continuation batches.")] = 0.4,
    save_every: Annotated[int, typer.Option(min=0, help="Steps between saves, 0: only at the end.")] = 500,
    eval_every: Annotated[int, typer.Option(min=0, help="Steps between evaluations, 0: only at the end.")] = 2000,
    eval_questions: Annotated[int, typer.Option(min=0, help="Questions per evaluation, 0: no evaluation.")] = 40,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Trade time for memory.")
    ] = False,
    fp32: Annotated[bool, typer.Option("--fp32", help="Load and compute in fp32 instead of bf16.")] = False,
    seed: Annotated[int, typer.Option(help="Which batches are drawn.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print parameters and memory, load no weights.")] = False,
    json: Json = False,
) -> None:
    """Train a compressor for a frozen LLM; run again with the same --out to resume.

    KL distillation from the LLM's own full-context answers plus cross-entropy, over questions, continuation and
    reconstruction. For several GPUs: accelerate launch -m condense_core.cli train ...
    """
    source = str(model_source(model))
    quiet_libraries()
    try:
        import torch

        from condense_core.training.run import RunConfig, plan
        from condense_core.training.run import train as run_training
        from condense_core.training.trainer import TrainConfig
    except ImportError as error:
        raise ImportError(f"train: needs {error.name}; install condense-core[train]") from error

    run = RunConfig(
        model=source,
        corpus=corpus,
        out=out,
        method=method,
        ratios=parse_ratios(ratios),
        encoder_layers=encoder_layers,
        lora_rank=lora_rank,
        halo=halo,
        causal=not bidirectional,
        eval_corpus=eval_corpus,
        eval_questions=eval_questions,
        dtype=torch.float32 if fp32 else torch.bfloat16,
    )
    config = TrainConfig(
        steps=steps,
        tokens=tokens,
        min_context=min_context,
        max_context=max_context,
        lr=lr,
        warmup=min(500, steps // 10),
        reconstruction=reconstruction,
        continuation=continuation,
        save_every=save_every,
        eval_every=eval_every,
        gradient_checkpointing=gradient_checkpointing,
        bf16=not fp32,
        seed=seed,
    )
    memory = plan(run, config)
    speaks = os.environ.get("RANK", "0") == "0"  # of several processes under accelerate or torchrun, one
    if speaks and not json:
        print("\n".join(memory.lines()))
    checkpoint = None
    if not dry_run:
        with _bar("training") as show:
            checkpoint = run_training(run, config, progress=lambda step, line: show(step, steps, line))
    if not speaks:
        return
    if json:
        print_json({"memory_bytes": memory.as_dict(), "checkpoint": str(checkpoint) if checkpoint else None})
    elif checkpoint:
        print(f"{checkpoint}: load it with Condenser.from_pretrained({source!r}, compressor={str(checkpoint)!r})")


def parse_ratios(text: str) -> tuple[int, ...]:
    """``"4,8"`` as (4, 8); ``ValueError`` for what is no list of ratios."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"ratios: got {text!r}, expected integers separated by commas, such as 4,8,16") from None
    return tuple(check_ratio(ratio) for ratio in found)


def parse_shares(text: str) -> tuple[float, ...]:
    """``"0.5,0.25"`` as (0.5, 0.25); ``ValueError`` for what is no list of shares in (0, 1]."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < share <= 1 for share in found):
        raise ValueError(f"keep: got {text!r}, expected shares in (0, 1] separated by commas, such as {DEFAULT_SHARES}")
    return found


@contextmanager
def _bar(title: str) -> Iterator[Any]:
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
