"""What ``condense bench encode`` measured, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from condense_core.profiling.stages import STAGES
from condense_core.tasks.plot import check_picture

if TYPE_CHECKING:
    from rich.table import Table


def measured(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that have times."""
    return [row for row in report["rows"] if "refused" not in row]


def as_tables(report: dict[str, Any]) -> list[Table]:
    """A table of what was measured, and one beside the padded batch where that was timed too.

    Times are medians in milliseconds, for the whole batch.
    """
    rows = measured(report)
    tables = [_table(title(report), rows, _COLUMNS)]
    if any("baseline" in row for row in rows):
        tables.append(_table("beside the same layers of transformers, on a padded batch", rows, _BESIDE))
    return tables


_Columns = dict[str, Callable[[dict[str, Any]], str]]
_COLUMNS: _Columns = {
    "layers": lambda row: str(row["layers"]),
    "batch": lambda row: str(row["batch"]),
    "tokens": lambda row: f"{row['tokens']:,}",
    "ms": lambda row: _range(row["seconds"]["total"]),
    **{stage: lambda row, stage=stage: _ms(row["seconds"][stage]["median"]) for stage in STAGES},  # type: ignore[misc]
    "contexts/s": lambda row: f"{row['contexts_per_second']:,.3g}",
    "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
    "peak MB (of a layer's)": lambda row: _peak(row),
    "of floor": lambda row: "-" if row["share_of_floor"] is None else f"{row['share_of_floor']:.0%}",
}
_BESIDE: _Columns = {
    "layers": lambda row: str(row["layers"]),
    "batch": lambda row: str(row["batch"]),
    "tokens": lambda row: f"{row['tokens']:,}",
    "padded tokens": lambda row: f"{row['baseline']['padded_tokens']:,}",
    "embed + encode ms": lambda row: _ms(row["seconds"]["embed"]["median"] + row["seconds"]["encode"]["median"]),
    "padded ms": lambda row: _range(row["baseline"]["seconds"]),
    "padded/packed": lambda row: f"{row['baseline']['padded_over_packed']:.2f}x",
}


def _table(heading: str, rows: list[dict[str, Any]], columns: _Columns) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=heading, title_justify="left", pad_edge=False, collapse_padding=True)
    for name in columns:
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    return table


def title(report: dict[str, Any]) -> str:
    """One line: what was measured where."""
    settings = report["settings"]
    threads = f", {report['threads']} thread{'s'[: report['threads'] > 1]}" if report["device"] == "cpu" else ""
    where = f"{report['dtype']} on {report['device']}{threads}"
    compiled = f", compiled ({settings['compile_encoder']})" if settings.get("compile_encoder") else ""
    return f"{report['model']}, {settings['method']} {settings['ratio']}x, {where}{compiled}"


def _peak(row: dict[str, Any]) -> str:
    if row["peak_bytes"] is None:
        return "-"
    return f"{row['peak_bytes'] / 1e6:,.0f} ({row['peak_bytes'] / row['layer_activation_bytes']:.2f}x)"


def _ms(seconds: float) -> str:
    milliseconds = seconds * 1e3
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _range(seconds: dict[str, float]) -> str:
    return f"{_ms(seconds['median'])} ({_ms(seconds['min'])}-{_ms(seconds['max'])})"


def plot_encode(report: dict[str, Any], path: str | Path) -> None:
    """Draw a bar for each row, split by stage, in milliseconds a context; a black line is the floor.

    Raises:
        ValueError, ImportError: nothing was measured, or as from ``tasks.plot.check_picture``.
    """
    check_picture(path)
    rows = measured(report)
    if not rows:
        raise ValueError("plot: nothing was measured; expected at least one row")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 1.6 + 0.45 * len(rows)), layout="constrained")
    places = list(range(len(rows)))
    left = [0.0] * len(rows)
    for stage, widths in _bars(rows):
        axes.barh(places, widths, left=left, height=0.6, label=stage)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    floors = [(place, row) for place, row in zip(places, rows, strict=True) if row["floor_seconds"] is not None]
    for number, (place, row) in enumerate(floors):
        x = row["floor_seconds"] * 1e3 / row["batch"]
        axes.plot([x, x], [place - 0.4, place + 0.4], color="black", label=None if number else "floor")
    axes.set_yticks(places, [f"{row['layers']} layers x {row['batch']}" for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds a context", title=title(report))
    axes.grid(axis="x", alpha=0.3)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    try:
        figure.savefig(path, dpi=120)
    finally:
        plt.close(figure)


def _bars(rows: list[dict[str, Any]]) -> Iterable[tuple[str, list[float]]]:
    """Milliseconds a context of each stage in each row, and of what is in none."""
    for stage in STAGES:
        yield stage, [row["seconds"][stage]["median"] * 1e3 / row["batch"] for row in rows]
    rest = []
    for row in rows:
        seconds = row["seconds"]
        known = sum(seconds[stage]["median"] for stage in STAGES)
        rest.append(max(0.0, seconds["total"]["median"] - known) * 1e3 / row["batch"])
    yield "other", rest
