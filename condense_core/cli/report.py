"""``condense report``: what stored evaluations say, as tables, comparisons and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from condense_core.cli.options import Json
from condense_core.cli.terminal import console, print_json


def report(
    files: Annotated[list[Path], typer.Argument(help="Reports that 'condense eval -o' wrote.", metavar="REPORT...")],
    against: Annotated[
        str | None,
        typer.Option(
            help="A method, or full: compare every row with it at the same ratio or kept share, question by question.",
            show_default="with two reports, each row of the second with the first's",
            metavar="METHOD",
        ),
    ] = None,
    measure: Annotated[str, typer.Option(help="What is compared: contained, f1, exact_match or loss.")] = "contained",
    plot: Annotated[
        Path | None, typer.Option(help="Draw quality over compression into this file.", metavar="FILE.png")
    ] = None,
    json: Json = False,
) -> None:
    """Show stored evaluations with their confidence intervals, compare them, and draw them.

    Two methods are compared on the questions that both were asked: the difference, its 95% interval, and the
    probability of such a difference if they were the same.
    """
    if plot is not None:
        from condense_core.tasks.plot import check_picture

        check_picture(plot)
    from condense_core.tasks.comparison import as_comparison_table, compare_reports, read_report

    reports = [read_report(path) for path in files]
    wanted = against is not None or len(reports) == 2
    compared = compare_reports(reports, measure=measure, against=against) if wanted else []
    if plot is not None:
        from condense_core.tasks.plot import plot_reports

        plot_reports(reports, plot)
    if json:
        print_json(compared)
        return
    from condense_core.tasks.report import as_pruning_table, as_table

    for one in reports:
        pruned = any("keep" in row for row in one["rows"])
        console().print(as_pruning_table(one) if pruned else as_table(one))
    if compared:
        console().print(as_comparison_table(compared))
