"""``condense train``: a compressor for a frozen LLM."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from condense_core.cli.options import Corpus, Json, Model, model_source, parse_ratios, quiet_libraries
from condense_core.cli.terminal import print_json, progress_bar
from condense_core.compressor.config import TRAINED_METHODS
from condense_core.tasks.wording import WORDINGS

EXIT_DIVERGED = 1  # the input was good; it is the training that came to nothing


def parse_weights(text: str | None, count: int) -> tuple[float, ...]:
    """``"2,2,1"`` as numbers, one for each of ``count`` ratios; () for None."""
    if text is None:
        return ()
    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError:
        weights = ()
    if len(weights) != count or not all(0 <= w < 1e6 for w in weights) or not weights[0]:
        raise ValueError(f"ratio_weights: got {text!r}, expected {count} numbers of at least 0, the first above 0")
    return weights


def train(
    out: Annotated[Path, typer.Option(help="Folder of the run: resumable state, log, checkpoint.")],
    model: Model = None,
    corpus: Corpus = None,
    eval_corpus: Corpus = None,
    max_documents: Annotated[int, typer.Option(min=1, help="Documents of the corpus that are read, at most.")] = 50_000,
    method: Annotated[str, typer.Option(help=f"What to train: {', '.join(TRAINED_METHODS)}.")] = "pool",
    ratios: Annotated[str, typer.Option(help="Comma-separated ratios that the checkpoint will serve.")] = "2,4,8,16",
    ratio_weights: Annotated[
        str | None, typer.Option(help="How often each ratio is drawn, as 2,2,1.", show_default="equally")
    ] = None,
    encoder_layers: Annotated[
        int | None,
        typer.Option(
            min=0, help="First layers of the LLM that read the context.", show_default="8, or half of a smaller LLM's"
        ),
    ] = None,
    lora_rank: Annotated[int, typer.Option(min=0, help="Rank of the encoder's adapter, 0 for none.")] = 32,
    halo: Annotated[int, typer.Option(min=0, help="Tokens a window also sees on either side (pool).")] = 0,
    window: Annotated[
        int, typer.Option(min=2, help="Tokens that share a soft token where they are not kept exact (mixed).")
    ] = 8,
    start_from: Annotated[
        Path | None, typer.Option(help="Checkpoint of a compressor whose weights this one begins with.")
    ] = None,
    bidirectional: Annotated[bool, typer.Option("--bidirectional", help="Let the encoder look both ways.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 20000,
    tokens: Annotated[int, typer.Option(min=64, help="Tokens per step and process.")] = 16384,
    min_context: Annotated[int, typer.Option(min=64, help="Shortest context in tokens.")] = 256,
    max_context: Annotated[int, typer.Option(min=64, help="Longest context in tokens.")] = 2048,
    turns: Annotated[int, typer.Option(min=1, help="Questions about a context, at most.")] = 8,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-4,
    reconstruction: Annotated[float, typer.Option(min=0, max=1, help="Share of reconstruction batches.")] = 0.2,
    continuation: Annotated[float, typer.Option(min=0, max=1, help="Share of continuation batches.")] = 0.4,
    quotes: Annotated[
        float, typer.Option(min=0, max=1, help="Share of batches that ask for the words behind some words.")
    ] = 0.0,
    told: Annotated[
        float, typer.Option(min=0, max=1, help="Share of batches about facts told in sentences, without the LLM.")
    ] = 0.0,
    warmup: Annotated[
        int | None, typer.Option(min=0, help="Steps of warm-up.", show_default="a tenth of the steps, at most 500")
    ] = None,
    curriculum: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the steps in which ratios come in, smallest first.")
    ] = 0.0,
    wording: Annotated[str, typer.Option(help=f"Of the facts asked about: {', '.join(WORDINGS)}.")] = "varied",
    taught_contexts: Annotated[
        int,
        typer.Option(
            min=0, help="Contexts that the LLM answers questions about once, before; 0: it reads each batch anew."
        ),
    ] = 0,
    taught_longest: Annotated[
        int,
        typer.Option(
            min=0, help="Tokens of such a context; longer ones are several of them.", show_default="as --max-context"
        ),
    ] = 0,
    teacher: Annotated[
        Path | None, typer.Option(help="Folder of these answers.", show_default="teacher, in the run's folder")
    ] = None,
    save_every: Annotated[int, typer.Option(min=0, help="Steps between saves, 0: only at the end.")] = 500,
    eval_every: Annotated[int, typer.Option(min=0, help="Steps between evaluations, 0: only at the end.")] = 2000,
    eval_questions: Annotated[int, typer.Option(min=0, help="Questions per evaluation, 0: only the controls.")] = 40,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Trade time for memory.")
    ] = False,
    fp32: Annotated[bool, typer.Option("--fp32", help="Load and compute in fp32 on a GPU too.")] = False,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Load and compute in bf16 on a CPU too (faster with AVX512-BF16 or AMX).")
    ] = False,
    seed: Annotated[int, typer.Option(help="Which batches are drawn.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print parameters and memory, load no weights.")] = False,
    json: Json = False,
) -> None:
    """Train a compressor for a frozen LLM; run again with the same --out to resume.

    KL distillation from the LLM's own full-context answers plus cross-entropy, over questions, continuation and
    reconstruction. For several GPUs: accelerate launch -m condense_core.cli train ...
    """
    if fp32 and bf16:
        raise ValueError("fp32, bf16: both given, expected at most one")
    if wording not in WORDINGS:
        raise ValueError(f"wording: got {wording!r}, expected one of {', '.join(WORDINGS)}")
    source = str(model_source(model))
    quiet_libraries()
    try:
        import torch

        from condense_core.training.finite import DivergenceError
        from condense_core.training.run import RunConfig, plan
        from condense_core.training.run import train as run_training
        from condense_core.training.trainer import TrainConfig, process_device
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
        window=window,
        start_from=start_from,
        causal=not bidirectional,
        eval_corpus=eval_corpus,
        max_documents=max_documents,
        eval_questions=eval_questions,
        wording=wording,
        taught_contexts=taught_contexts,
        taught_longest=taught_longest,
        teacher=teacher,
        # By default fp32 on a CPU, the checkpoint's own on a GPU.
        dtype=torch.float32 if fp32 else torch.bfloat16 if bf16 else None,
    )
    config = TrainConfig(
        steps=steps,
        tokens=tokens,
        min_context=min_context,
        max_context=max_context,
        turns=turns,
        lr=lr,
        warmup=min(500, steps // 10) if warmup is None else warmup,
        reconstruction=reconstruction,
        continuation=continuation,
        quotes=quotes,
        told=told,
        ratio_weights=parse_weights(ratio_weights, len(run.ratios)),
        curriculum=curriculum,
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
        if dry_run and not fp32 and process_device().type == "cpu":
            gpu = plan(run, config, device="cuda")
            print(f"                   {gpu.total / 2**30:10.2f} GiB per process, on a GPU in {gpu.dtype}")
    checkpoint = None
    if not dry_run:
        try:
            with progress_bar("training") as show:
                checkpoint = run_training(
                    run,
                    config,
                    progress=lambda step, line: show(step, steps, line),
                    on_teaching=lambda done, of: show(done, of, "the LLM answers"),
                )
        except DivergenceError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(EXIT_DIVERGED) from None
    if not speaks:
        return
    if json:
        print_json({"memory_bytes": memory.as_dict(), "checkpoint": str(checkpoint) if checkpoint else None})
    elif checkpoint:
        print(f"{checkpoint}: load it with Condenser.from_pretrained({source!r}, compressor={str(checkpoint)!r})")
