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

EXIT_DIVERGED = 1  # the input was good; it is the training that came to nothing


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
    fp32: Annotated[bool, typer.Option("--fp32", help="Load and compute in fp32 on a GPU too.")] = False,
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
        causal=not bidirectional,
        eval_corpus=eval_corpus,
        eval_questions=eval_questions,
        dtype=torch.float32 if fp32 else None,  # fp32 on a CPU, the checkpoint's own on a GPU
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
        if dry_run and not fp32 and process_device().type == "cpu":
            gpu = plan(run, config, device="cuda")
            print(f"                   {gpu.total / 2**30:10.2f} GiB per process, on a GPU in {gpu.dtype}")
    checkpoint = None
    if not dry_run:
        try:
            with progress_bar("training") as show:
                checkpoint = run_training(run, config, progress=lambda step, line: show(step, steps, line))
        except DivergenceError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(EXIT_DIVERGED) from None
    if not speaks:
        return
    if json:
        print_json({"memory_bytes": memory.as_dict(), "checkpoint": str(checkpoint) if checkpoint else None})
    elif checkpoint:
        print(f"{checkpoint}: load it with Condenser.from_pretrained({source!r}, compressor={str(checkpoint)!r})")
