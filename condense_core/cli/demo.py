"""``condense demo``: one text, every way to make it small, what that saves and what the model knows from it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from condense_core.cli.options import (
    Compressor,
    Device,
    Json,
    Method,
    Model,
    TemplateArg,
    load_condenser,
    parse_template_args,
)
from condense_core.cli.terminal import console, print_json, working

if TYPE_CHECKING:
    from rich.console import Console

    from condense_core.tasks.demo import Report
    from condense_core.tasks.showcase import Showcase

PUBLIC_MODEL = "smollm2-135m"


def demo(
    model: Model = None,
    method: Method = None,
    compressor: Compressor = None,
    template_arg: TemplateArg = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Give an LLM a text of 6,700 characters in every way, time it, and ask six questions.

    Without --model it is SmolLM2, fetched the first time (93 MB), or the embedded model where it cannot be had. With
    --method or --compressor, and for a model with compressors of its own: soft tokens at three ratios.
    """
    if model is None and method is None and compressor is None:
        model = _default_model()
    condenser = load_condenser(model, method, device, compressor, parse_template_args(template_arg))
    from condense_core.compressor.choice import find_checkpoint
    from condense_core.tasks.demo import run_demo
    from condense_core.tasks.showcase import run_showcase

    own = find_checkpoint(condenser.model) is not None and model != PUBLIC_MODEL
    if own or method is not None or compressor is not None:
        with working("measuring and answering"):
            report = run_demo(condenser)
        print_json(report.to_json()) if json else render(report, console())
        return
    with working("measuring and answering: about a minute"):
        showcase = run_showcase(condenser)
    print_json(showcase.to_json()) if json else render_showcase(showcase, console())


def render(report: Report, console: Console) -> None:
    """Print the report as two tables, each under a sentence that says how to read it."""
    from rich.markup import escape

    console.print(
        f"The text: {report.context_chars:,} characters, {report.context_tokens:,} tokens. "
        f"The model: {escape(report.model)} on {escape(report.device)}, compressor {report.method!r}.\n"
    )
    _render_costs(report, console)
    console.print()
    _render_answers(report, console)


def _render_costs(report: Report, console: Console) -> None:
    from rich import box
    from rich.table import Table

    console.print(
        "What it costs: before it answers, the model must read either the text's tokens or the fewer soft tokens "
        "made from them (made once, used for every question)."
    )
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("the model reads")
    for heading in ("positions", "KV cache", "compress", "first token", "compress + first token"):
        table.add_column(heading, justify="right")
    full = report.ttft_ms["full"]
    table.add_row(
        "the full text", f"{report.context_tokens:,}", _size(report.kv_bytes["full"]), "-", _ms(full), _ms(full)
    )
    for key, count in report.soft_tokens.items():
        compress, first = report.compress_ms[key], report.ttft_ms[key]
        table.add_row(
            f"soft tokens, {key}x",
            f"{count:,}",
            _size(report.kv_bytes[key]),
            _ms(compress),
            f"{_ms(first)} ({full / first:.1f}x faster)" if first < full else _ms(first),
            _ms(compress + first),
        )
    console.print(table)


def _render_answers(report: Report, console: Console) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from condense_core.tasks.demo import DEMO_FACTS
    from condense_core.tasks.metrics import contained

    right, wrong = _marks(console)
    console.print(
        f"What the model still knows: its answers ({right} right, {wrong} wrong) with the full text, with soft tokens "
        "in its place, and with nothing but the question."
    )
    headings = {"full": "full text", **{key: f"{key}x" for key in report.soft_tokens}, "none": "no text"}
    table = Table("question", "expected", *(headings[key] for key in report.answers), box=box.SIMPLE_HEAD)
    scores = dict.fromkeys(report.answers, 0)
    for i, fact in enumerate(DEMO_FACTS):
        cells = []
        for key, given in report.answers.items():
            correct = bool(contained(given[i], fact.answer))
            scores[key] += correct
            mark = f"[green]{right}[/]" if correct else f"[red]{wrong}[/]"
            cells.append(f"{mark} {escape(_shorten(given[i]))}")
        table.add_row(fact.question, fact.answer, *cells)
    table.add_section()
    table.add_row("right answers", "", *(f"{score} of {len(DEMO_FACTS)}" for score in scores.values()))
    console.print(table)


def _shorten(answer: str, limit: int = 28) -> str:
    line = "".join(c if c.isprintable() else " " for c in " ".join(answer.split())) or "(nothing)"
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:,.0f} ms" if milliseconds >= 10 else f"{milliseconds:.1f} ms"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:,.1f} kB"


def _default_model() -> str | None:
    """The public model, which is fetched the first time; None, which is the embedded one, where it cannot be had."""
    from condense_core.cli.models import fetching
    from condense_core.decoder.fetch import fetch_model

    try:
        with fetching() as told:
            fetch_model(PUBLIC_MODEL, progress=told)
    except (OSError, ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        print(f"note: {PUBLIC_MODEL} cannot be had ({reason}); the embedded model stands in for it", file=sys.stderr)
        return None
    return PUBLIC_MODEL


def render_showcase(report: Showcase, console: Console) -> None:
    """Print the ways as a table of what they cost, and one of what the model answers."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from condense_core.tasks.demo import DEMO_FACTS
    from condense_core.tasks.showcase import right_answers

    right, wrong = _marks(console)
    console.print(
        f"The text: {report.context_chars:,} characters, {report.context_tokens:,} tokens. "
        f"The model, as its makers left it: {escape(report.model)} on {escape(report.device)}.\n"
    )
    console.print("What it costs to give the model the text, and how many of six questions it then answers right.")
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("the model has", no_wrap=True)
    for heading in ("positions", "KV cache", "once for the text", "a question to its first token", "right"):
        table.add_column(heading, justify="right")
    for way in report.ways:
        table.add_row(
            way.name,
            f"{way.positions:,}",
            _size(way.kv_bytes) if way.kv_bytes else "-",
            _ms(way.once_ms) if way.once_ms is not None else "-",
            _ms(way.question_ms),
            f"{sum(right_answers(way.answers))} of {len(DEMO_FACTS)}",
        )
    console.print(table)
    console.print()
    console.print(f"What it answers ({right} right, {wrong} wrong).")
    for i, fact in enumerate(DEMO_FACTS):
        answers = Table(box=None, show_header=False, padding=(0, 1))
        answers.add_column(no_wrap=True)
        answers.add_column()
        for way in report.ways:
            correct = right_answers(way.answers)[i]
            mark = f"[green]{right}[/]" if correct else f"[red]{wrong}[/]"
            answers.add_row(f"  {way.name}", f"{mark} {escape(_shorten(way.answers[i], 100))}")
        console.print(f"{escape(fact.question)} ({escape(fact.answer)})")
        console.print(answers)


def _marks(console: Console) -> tuple[str, str]:
    """The signs of a right and a wrong answer, as far as the terminal has them."""
    unicode = (console.encoding or "").lower().startswith("utf")
    return ("\N{CHECK MARK}", "\N{BALLOT X}") if unicode else ("ok", "x")
