"""Run an evaluation as a user asks for it, and show it: the machinery of ``condense eval``."""

from __future__ import annotations

import datetime
import hashlib
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich import box
from rich.markup import escape
from rich.table import Table

from condense_core._version import __version__
from condense_core.compressor.condenser import Condenser
from condense_core.tasks.evaluate import EvalRow, evaluate
from condense_core.tasks.generators import Task, TaskConfig, make_tasks
from condense_core.tasks.pruning import PruningRow, evaluate_pruning
from condense_core.tasks.sources import open_source
from condense_core.tasks.squad import SquadConfig, read_squad, squad_tasks

Progress = Callable[[int, int], None]
Report = dict[str, Any]

#: Seconds between two reports of a context that takes long; the end of each context is reported anyway.
_REPORT_EVERY = 5.0


def run_evaluation(
    condensers: dict[str, Condenser],
    *,
    corpus: str | Path | None,
    ratios: Sequence[float],
    num_questions: int,
    config: TaskConfig | SquadConfig,
    seed: int = 0,
    max_new_tokens: int | None = None,
    progress: Progress | None = None,
    on_report: Callable[[Report], None] | None = None,
) -> Report:
    """Question answering over ``corpus``, as a JSON-ready report.

    Args:
        condensers: as ``evaluate`` takes them, like ``ratios`` and ``max_new_tokens``.
        corpus: as ``open_source`` takes it, of the facts that a ``TaskConfig`` describes (None: the built-in prose);
            with a ``SquadConfig`` a file in SQuAD's format.
        ratios: of soft tokens.
        num_questions: contexts are drawn until at least so many questions are asked.
        config: of the tasks.
        seed: which contexts and questions are drawn.
        max_new_tokens: of an answer.
        progress: called with (contexts done, contexts).
        on_report: called with the report as it grows, the last time when an error or an interruption ends the
            evaluation; its ``complete`` is then false.
    """
    for condenser in condensers.values():
        for ratio in ratios:
            condenser.check_ratio(ratio)
    run = _Run(next(iter(condensers.values())), corpus, num_questions, config, seed, progress, on_report)
    options: dict[str, Any] = {"ratios": ratios, "max_new_tokens": max_new_tokens}
    return run.complete(lambda **hooks: evaluate(condensers, run.tasks, **options, **hooks))


def run_pruning_evaluation(
    condenser: Condenser,
    *,
    corpus: str | Path | None,
    methods: Sequence[str],
    shares: Sequence[float],
    window: int | None = None,
    num_questions: int,
    config: TaskConfig | SquadConfig,
    seed: int = 0,
    max_new_tokens: int | None = None,
    progress: Progress | None = None,
    on_report: Callable[[Report], None] | None = None,
) -> Report:
    """As ``run_evaluation``, of caches that ``methods`` prune to ``shares``; see ``evaluate_pruning``."""
    run = _Run(condenser, corpus, num_questions, config, seed, progress, on_report)
    options: dict[str, Any] = {
        "methods": methods,
        "shares": shares,
        "window": window,
        "max_new_tokens": max_new_tokens,
    }
    return run.complete(lambda **hooks: evaluate_pruning(condenser, run.tasks, **options, **hooks))


class _Run:
    """An evaluation: its tasks, and the report that grows while they are done."""

    def __init__(
        self,
        condenser: Condenser,
        corpus: str | Path | None,
        num_questions: int,
        config: TaskConfig | SquadConfig,
        seed: int,
        progress: Progress | None,
        on_report: Callable[[Report], None] | None,
    ) -> None:
        if num_questions < 1:
            raise ValueError(f"questions: got {num_questions}, expected at least 1")
        self.condenser, self.corpus, self.config, self.seed = condenser, corpus, config, seed
        self.progress, self.on_report = progress, on_report
        self.tasks = _tasks(corpus, num_questions, config, seed)
        self.done = 0
        self.rows: Callable[[], Sequence[EvalRow | PruningRow]] | None = None  # None: nothing is measured yet
        self.reported_at = float("-inf")

    def complete(self, evaluation: Callable[..., Sequence[EvalRow | PruningRow]]) -> Report:
        """Run ``evaluation``, which takes the hooks ``progress`` and ``on_rows``; its report."""
        try:
            rows = evaluation(progress=self.count, on_rows=self.grow)
        except BaseException:
            self.tell()
            raise
        report = self.report(rows, complete=True)
        if self.on_report:
            self.on_report(report)
        return report

    def grow(self, rows: Callable[[], Sequence[EvalRow | PruningRow]]) -> None:
        """There are new results, which ``rows`` gives."""
        self.rows = rows
        if time.monotonic() - self.reported_at > _REPORT_EVERY:
            self.tell()

    def count(self) -> None:
        """One more context is done."""
        self.done += 1
        if self.done < len(self.tasks):
            self.tell()
        if self.progress:
            self.progress(self.done, len(self.tasks))

    def tell(self) -> None:
        """Report what is measured so far."""
        if self.on_report and self.rows:
            self.on_report(self.report(self.rows(), complete=False))
            self.reported_at = time.monotonic()

    def report(self, rows: Sequence[EvalRow | PruningRow], *, complete: bool) -> Report:
        """JSON-ready."""
        config, device = self.config, self.condenser.device
        facts = config if isinstance(config, TaskConfig) else None
        return {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "model": self.condenser.model_id,
            "corpus": Path(self.corpus).name if self.corpus else "built-in prose",
            "complete": complete,
            "contexts": self.done,
            "questions": sum(len(task.turns) for task in self.tasks[: self.done]),
            "context_chars": [config.min_chars, config.max_chars],
            "task": "facts" if facts else "squad",
            "facts_per_context": facts.num_facts if facts else None,
            "wording": facts.wording if facts else None,
            "seed": self.seed,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
            "dtype": str(self.condenser.dtype).removeprefix("torch."),
            **({"encoder_weights": self.condenser.encoder_weights} if self.condenser.encoder_weights else {}),
            "versions": {
                "condense_core": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "asked": [
                {"context": number, "kind": turn.kind, "id": _question_id(task.context, turn.question)}
                for number, task in enumerate(self.tasks)
                for turn in task.turns
            ],
            "rows": [row.as_dict() for row in rows],
        }


def _tasks(corpus: str | Path | None, num_questions: int, config: TaskConfig | SquadConfig, seed: int) -> list[Task]:
    """Contexts until at least so many questions are asked."""
    if isinstance(config, TaskConfig):
        count = -(-num_questions // config.num_questions)
        return list(make_tasks("question", open_source(corpus), count, seed=seed, config=config))
    if corpus is None:
        raise ValueError("corpus: got None, expected a file in SQuAD's format")
    tasks: list[Task] = []
    asked = 0
    for task in squad_tasks(read_squad(corpus), num_questions, seed=seed, config=config):
        tasks.append(task)
        asked += len(task.turns)
        if asked >= num_questions:
            break
    return tasks


def _question_id(context: str, question: str) -> str:
    """The same in every report that asks this about this; says nothing of either, whose texts may not be shared."""
    return hashlib.sha256(f"{context}\0{question}".encode()).hexdigest()[:16]


def _cpu() -> str:
    return f"CPU, {torch.get_num_threads()} threads"


def as_table(report: Report) -> Table:
    """The report's rows, controls first, then method by method."""
    table = _table(report, "context", "ratio", "positions", *_SCORES, "compress ms", "answer ms")
    for row in _in_sections(table, report):
        table.add_row(
            {"full": "full text", "none": "no context"}.get(row["method"], row["method"]),
            f"{row['ratio']}x" if row["ratio"] else "",
            f"{row['positions']:,.0f}",
            *_scores(row),
            f"{row['compress_ms']:.0f}" if row["ratio"] else "",
            f"{row['answer_ms']:.0f}",
        )
    return table


def as_pruning_table(report: Report) -> Table:
    """The rows of an evaluation of pruned caches, controls first, then method by method."""
    table = _table(report, "cache", "keep", "bytes", "smaller", *_SCORES, "prefill ms", "answer ms")
    reasons = []
    for row in _in_sections(table, report):
        name = {"full": "full cache", "none": "no context"}.get(row["method"], row["method"])
        share = f"{row['keep']:g}" if row["method"] not in ("full", "none") else ""
        if row["not_possible"]:
            table.add_row(name, share, "", "", "not possible")
            reasons.append(f"{name} at {share} is not possible: {row['not_possible']}")
            continue
        table.add_row(
            name,
            share,
            f"{row['cache_bytes']:,.0f}" if row["cache_bytes"] else "",
            f"{row['ratio']:.2f}x" if row["ratio"] else "",
            *_scores(row),
            f"{row['prefill_ms']:.0f}" if row["prefill_ms"] else "",
            f"{row['answer_ms']:.0f}",
        )
    table.caption = escape("\n".join(reasons)) if reasons else None
    table.caption_justify = "left"
    return table


_SCORES = ("contained", "F1", "exact match", "loss", "recovered", "of full")


def _scores(row: dict[str, Any]) -> list[str]:
    """The cells of the columns ``_SCORES``: values, and their intervals where the report has them."""
    found = row.get("intervals") or {}  # reports of 0.1 have none

    def cell(key: str, shown: Callable[[float], str]) -> str:
        value, interval = row.get(key), found.get(key)
        if value is None:
            return ""
        bounds = "" if interval is None else f" [{', '.join(shown(bound).removesuffix('%') for bound in interval)}]"
        return shown(value) + bounds

    shares = [cell(key, "{:.0%}".format) for key in ("contained", "f1", "exact_match")]
    return [
        *shares,
        cell("loss", "{:.2f}".format),
        cell("recovered", "{:.2f}".format),
        cell("share_of_full", "{:.0%}".format),
    ]


def _table(report: Report, *columns: str) -> Table:
    low, high = report["context_chars"]
    title = (
        f"{report['questions']} questions about {report['contexts']} contexts of {low:,} to {high:,} characters "
        f"({report['corpus']}), {report['model']}"
    )
    table = Table(
        title=title if report["complete"] else f"{title}; not complete",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for i, name in enumerate(columns):  # in a narrow terminal numbers fold, so that no digit is cut away
        table.add_column(name, justify="right" if i else "left", no_wrap=i == 0, overflow="fold")
    return table


def _in_sections(table: Table, report: Report) -> Iterator[dict[str, Any]]:
    """The report's rows, with a line in ``table`` between methods; both controls are one section."""
    previous = None
    for row in report["rows"]:
        if previous is not None and row["method"] not in (previous, "none"):
            table.add_section()
        previous = row["method"]
        yield row
