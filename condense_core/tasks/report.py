"""Run an evaluation as a user asks for it, and show it: the machinery of ``condense eval``."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table

from condense_core._version import __version__
from condense_core.compressor.condenser import Condenser
from condense_core.tasks.evaluate import EvalRow, evaluate
from condense_core.tasks.generators import TaskConfig, make_tasks
from condense_core.tasks.pruning import PruningRow, evaluate_pruning
from condense_core.tasks.sources import open_source

Progress = Callable[[int, int], None]


def run_evaluation(
    condensers: dict[str, Condenser],
    *,
    corpus: str | Path | None,
    ratios: Sequence[int],
    num_questions: int,
    config: TaskConfig,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Question answering over ``corpus`` (``None``: the built-in prose), as a JSON-ready report.

    Contexts are drawn until at least ``num_questions`` questions are asked. progress: (contexts done, contexts).
    """
    for condenser in condensers.values():
        for ratio in ratios:
            condenser.check_ratio(ratio)
    drawn = _Drawn(corpus, num_questions, config, seed, progress)
    rows = evaluate(condensers, drawn.tasks, ratios=ratios, progress=drawn.count)
    return drawn.report(next(iter(condensers.values())), [row.as_dict() for row in rows])


def run_pruning_evaluation(
    condenser: Condenser,
    *,
    corpus: str | Path | None,
    methods: Sequence[str],
    shares: Sequence[float],
    window: int | None = None,
    num_questions: int,
    config: TaskConfig,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """As ``run_evaluation``, of caches that ``methods`` prune to ``shares``; see ``evaluate_pruning``."""
    drawn = _Drawn(corpus, num_questions, config, seed, progress)
    rows = evaluate_pruning(condenser, drawn.tasks, methods=methods, shares=shares, window=window, progress=drawn.count)
    return drawn.report(condenser, [row.as_dict() for row in rows])


class _Drawn:
    """The tasks of an evaluation, and what its report says of them."""

    def __init__(
        self, corpus: str | Path | None, num_questions: int, config: TaskConfig, seed: int, progress: Progress | None
    ) -> None:
        if num_questions < 1:
            raise ValueError(f"questions: got {num_questions}, expected at least 1")
        self.corpus, self.config, self.seed, self.progress = corpus, config, seed, progress
        self.contexts = -(-num_questions // config.num_questions)
        self.done = 0
        self.tasks = make_tasks("question", open_source(corpus), self.contexts, seed=seed, config=config)

    def count(self) -> None:
        """One more context is done."""
        self.done += 1
        if self.progress:
            self.progress(self.done, self.contexts)

    def report(self, condenser: Condenser, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """JSON-ready."""
        config, device = self.config, condenser.device
        return {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "model": condenser.model_id,
            "corpus": Path(self.corpus).name if self.corpus else "built-in prose",
            "contexts": self.contexts,
            "questions": self.contexts * config.num_questions,
            "context_chars": [config.min_chars, config.max_chars],
            "facts_per_context": config.num_facts,
            "seed": self.seed,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
            "dtype": str(condenser.dtype).removeprefix("torch."),
            "versions": {
                "condense_core": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "rows": rows,
        }


def _cpu() -> str:
    return f"CPU, {torch.get_num_threads()} threads"


def as_table(report: dict[str, Any]) -> Table:
    """The report's rows, controls first, then method by method."""
    table = Table(title=_title(report))
    names = ("context", "ratio", "positions", "exact match", "F1", "recovered", "loss", "compress ms", "answer ms")
    for name in names:
        table.add_column(name, justify="left" if name == "context" else "right", no_wrap=True)
    previous = None
    for row in (EvalRow(**r) for r in report["rows"]):
        if previous is not None and row.method != previous and row.method != "none":
            table.add_section()
        previous = row.method
        table.add_row(
            {"full": "full text", "none": "no context"}.get(row.method, row.method),
            f"{row.ratio}x" if row.ratio else "",
            f"{row.positions:,.0f}",
            f"{row.accuracy:.1%}",
            f"{row.f1:.1%}",
            f"{row.recovered:.2f}",
            f"{row.loss:.3f}",
            f"{row.compress_ms:.0f}" if row.ratio else "",
            f"{row.answer_ms:.0f}",
        )
    return table


def as_pruning_table(report: dict[str, Any]) -> Table:
    """The rows of an evaluation of pruned caches, controls first, then method by method."""
    table = Table(title=_title(report))
    names = ("cache", "keep", "bytes", "smaller", "exact match", "F1", "recovered", "loss", "prefill ms", "answer ms")
    for name in names:
        table.add_column(name, justify="left" if name == "cache" else "right", no_wrap=True)
    previous = None
    for row in (PruningRow(**r) for r in report["rows"]):
        if previous is not None and row.method != previous and row.method != "none":
            table.add_section()
        previous = row.method
        table.add_row(
            {"full": "full cache", "none": "no context"}.get(row.method, row.method),
            f"{row.keep:g}" if row.method not in ("full", "none") else "",
            f"{row.cache_bytes:,.0f}" if row.cache_bytes else "",
            f"{row.ratio:.2f}x" if row.ratio else "",
            f"{row.accuracy:.1%}",
            f"{row.f1:.1%}",
            f"{row.recovered:.2f}",
            f"{row.loss:.3f}",
            f"{row.prefill_ms:.0f}" if row.prefill_ms else "",
            f"{row.answer_ms:.0f}",
        )
    return table


def _title(report: dict[str, Any]) -> str:
    low, high = report["context_chars"]
    return (
        f"{report['questions']} questions about {report['contexts']} contexts of {low:,} to {high:,} characters "
        f"({report['corpus']}), {report['model']}"
    )
