"""``condense demo``: one text, its soft tokens at three ratios, what they save and what the model knows from them."""

from __future__ import annotations

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


def demo(
    model: Model = None,
    method: Method = None,
    compressor: Compressor = None,
    template_arg: TemplateArg = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Compress a text of 6,700 characters, time it, and ask questions with and without compression."""
    condenser = load_condenser(model, method, device, compressor, parse_template_args(template_arg))
    from condense_core.tasks.demo import run_demo

    with working("measuring and answering"):
        report = run_demo(condenser)
    if json:
        print_json(report.to_json())
    else:
        render(report, console())


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

    unicode = (console.encoding or "").lower().startswith("utf")
    right, wrong = ("\N{CHECK MARK}", "\N{BALLOT X}") if unicode else ("ok", "x")
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
