"""A training run from a model's name and a corpus to a checkpoint: the machinery of ``condense train``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from condense_core.compressor.compressor import Compressor
from condense_core.compressor.condenser import Condenser
from condense_core.compressor.config import MEMORY_SEGMENT, TRAINED_METHODS, CompressorConfig, check_ratio
from condense_core.decoder.model import open_decoder, public_model_id
from condense_core.tasks.evaluate import evaluate
from condense_core.tasks.generators import TaskConfig, make_tasks
from condense_core.tasks.sources import open_source
from condense_core.training.controls import control_batches, controls
from condense_core.training.data import BatchMaker
from condense_core.training.plan import MemoryPlan, memory_plan, meta_model
from condense_core.training.store import SentenceStore
from condense_core.training.teacher import teach
from condense_core.training.trainer import TrainConfig, autocasts, process_device, train_compressor


@dataclass(frozen=True)
class RunConfig:
    """What to train, on what, and where to write.

    Attributes:
        model: folder or hub id of the frozen decoder.
        corpus, eval_corpus: as ``tasks.open_source`` takes them.
        out: the run's folder; its ``checkpoint`` is what ``Condenser.from_pretrained(model, compressor=...)`` loads.
        method: ``pool``, ``mixed``, ``mean`` or ``memory``.
        ratios, encoder_layers, lora_rank, num_heads, halo, causal, window_queries, window: as in ``CompressorConfig``;
            encoder_layers: default 8, or half of a smaller decoder; num_heads 0: as many as the decoder's query heads.
        start_from: a checkpoint of a compressor whose weights this one begins with, see ``Compressor.start_from``.
        residual: as in ``CompressorConfig``; of no meaning for ``memory``.
        wording: of the facts that questions are about, as ``tasks.wording`` has them.
        taught_contexts: about how many contexts the decoder answers questions before the training, see
            ``teacher.teach``; 0: it reads each context of the training anew.
        taught_longest: tokens of these contexts, at most; longer ones are several of them. 0: the longest trained on.
        teacher: folder of these answers, which several runs may share; None: ``out/teacher``.
        eval_questions: how many are asked at each evaluation, beside the controls of ``training.controls``; 0: none.
        max_documents: how many documents of the corpus are read.
        dtype: of the frozen decoder; None: as ``open_decoder`` chooses, fp32 on a CPU, the checkpoint's own on a GPU.
    """

    model: str
    corpus: str | None
    out: Path
    method: str = "pool"
    ratios: tuple[float, ...] = (2, 4, 8, 16)
    encoder_layers: int | None = None
    lora_rank: int = 32
    num_heads: int = 0
    halo: int = 0
    causal: bool = True
    window_queries: bool = False
    window: int = 8
    start_from: Path | None = None
    residual: bool = True
    wording: str = "varied"
    taught_contexts: int = 0
    taught_longest: int = 0
    teacher: Path | None = None
    eval_corpus: str | None = None
    eval_questions: int = 40
    max_documents: int = 50_000
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.method not in TRAINED_METHODS:
            raise ValueError(
                f"method: got {self.method!r}, expected one of {', '.join(TRAINED_METHODS)}; 'select' is not trained"
            )
        if not self.ratios:
            raise ValueError("ratios: empty; expected at least one")
        for ratio in self.ratios:
            check_ratio(ratio, self.method)

    def compressor_config(self, model: PreTrainedModel) -> CompressorConfig:
        """The architecture for ``model``: one head per query head, an MLP as wide as the model's embeddings twice."""
        width = model.get_input_embeddings().weight.shape[1]
        layers = self.encoder_layers
        if layers is None:
            layers = min(8, model.config.num_hidden_layers // 2)
        rank = self.lora_rank if layers else 0  # without layers there is nothing to adapt
        return CompressorConfig(
            method=self.method,
            d_model=width,
            encoder_layers=layers,
            causal=self.causal,
            ratios=tuple(sorted(set(self.ratios))),
            num_heads=(self.num_heads or model.config.num_attention_heads) if self.method in ("pool", "mixed") else 1,
            halo=self.halo if self.method == "pool" else 0,
            window_queries=self.window_queries and self.method == "pool",
            window=self.window if self.method == "mixed" else 0,
            mlp_hidden=2 * width,
            residual=self.residual and self.method != "memory",
            segment_tokens=MEMORY_SEGMENT if self.method == "memory" else 0,
            lora_rank=rank,
            lora_alpha=float(rank),
            model_id=public_model_id(self.model),
        )


def plan(run: RunConfig, train: TrainConfig, *, device: str | None = None) -> MemoryPlan:
    """Memory of the run per process, from the model's shapes alone; loads no weights.

    Args:
        run: what is trained.
        train: how.
        device: type of the device to plan for, ``cpu`` or ``cuda``; None: the one that would train here. It decides the
            dtype, as in ``RunConfig.dtype`` and ``TrainConfig.bf16``.
    """
    where = device or process_device().type
    model = meta_model(run.model, run.dtype or (torch.float32 if where == "cpu" else None))
    return memory_plan(model, run.compressor_config(model), train, autocast=autocasts(train, model.dtype, where))


def train(
    run: RunConfig,
    config: TrainConfig,
    *,
    progress: Callable[[int, str], None] | None = None,
    on_teaching: Callable[[int, int], None] | None = None,
) -> Path:
    """Train or resume; returns the checkpoint's folder. Errors are those of ``train_compressor`` and ``teach``.

    progress: called as ``train_compressor`` says. on_teaching: as ``teach`` says, before that.
    """
    corpus = open_source(run.corpus)
    eval_corpus = open_source(run.eval_corpus)
    model, tokenizer = open_decoder(run.model, device=process_device(), dtype=run.dtype)
    compressor = Compressor(model, run.compressor_config(model))
    compressor.attach_lora()
    if compressor.pooler is not None:
        compressor.pooler.start_ordered()  # of nothing, for ``mean``
    if run.start_from is not None:
        compressor.start_from(run.start_from)
    store = SentenceStore((corpus.document(i) for i in range(min(len(corpus), run.max_documents))), tokenizer)
    if len(store.ids) < config.max_context:
        raise ValueError(
            f"corpus: {len(store.ids):,} tokens, expected at least max_context = {config.max_context:,}; a shorter one "
            "would repeat itself inside a context"
        )
    if run.taught_longest and not config.min_context <= run.taught_longest <= config.max_context:
        raise ValueError(
            f"taught_longest: got {run.taught_longest}, expected one between min_context = {config.min_context} and "
            f"max_context = {config.max_context}, or 0"
        )
    maker = BatchMaker(store, tokenizer, seed=config.seed, wording=run.wording)
    taught = None
    if run.taught_contexts:
        taught = teach(
            model.requires_grad_(False),
            maker,
            run.teacher or run.out / "teacher",
            contexts=run.taught_contexts,
            min_context=config.min_context,
            max_context=run.taught_longest or config.max_context,
            turns=config.turns,
            progress=on_teaching,
        )

    watched = control_batches(BatchMaker(store, tokenizer, seed=config.seed, split="eval", wording=run.wording))

    def quality(live: Compressor) -> dict[str, Any]:
        seen = controls(model, live, [batch.to(process_device()) for batch in watched], live.config.ratios)
        if not run.eval_questions:
            return {"controls": seen}
        condenser = Condenser(model, tokenizer, compressor=live)
        shape = TaskConfig(min_chars=2000, max_chars=3000, num_facts=8, num_questions=5, wording=run.wording)
        tasks = make_tasks("question", eval_corpus, -(-run.eval_questions // 5), seed=config.seed, config=shape)
        rows = evaluate({run.method: condenser}, tasks, ratios=live.config.ratios)
        shown = ("contained", "exact_match", "f1", "loss", "recovered")
        return {
            "controls": seen,
            **{f"{row.method}/{row.ratio}": {key: getattr(row, key) for key in shown} for row in rows},
        }

    train_compressor(model, compressor, maker, config, run.out, taught=taught, evaluate=quality, progress=progress)
    return run.out / "checkpoint"
