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
    if num_questions < 1:
        raise ValueError(f"questions: got {num_questions}, expected at least 1")
    for condenser in condensers.values():
        for ratio in ratios:
            condenser.check_ratio(ratio)
    contexts = -(-num_questions // config.num_questions)
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, contexts)

    tasks = make_tasks("question", open_source(corpus), contexts, seed=seed, config=config)
    rows = evaluate(condensers, tasks, ratios=ratios, progress=count)
    first = next(iter(condensers.values()))
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "model": first.model_id,
        "corpus": Path(corpus).name if corpus else "built-in prose",
        "contexts": contexts,
        "questions": contexts * config.num_questions,
        "context_chars": [config.min_chars, config.max_chars],
        "facts_per_context": config.num_facts,
        "seed": seed,
        "device": torch.cuda.get_device_name(first.device) if first.device.type == "cuda" else _cpu(),
        "dtype": str(first.dtype).removeprefix("torch."),
        "versions": {
            "condense_core": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "rows": [row.as_dict() for row in rows],
    }


def _cpu() -> str:
    return f"CPU, {torch.get_num_threads()} threads"


def as_table(report: dict[str, Any]) -> Table:
    """The report's rows, controls first, then method by method."""
    low, high = report["context_chars"]
    table = Table(
        title=f"{report['questions']} questions about {report['contexts']} contexts of {low:,} to {high:,} characters "
        f"({report['corpus']}), {report['model']}"
    )
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
