"""Quality over compression as a picture, from reports of ``condense eval``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from condense_core.tasks.comparison import CONTROLS, Report, size_of

MEASURES = {
    "share_of_full": "right answers, share of those with the full context",
    "recovered": "recovered share of the loss",
    "contained": "answers that contain the expected one",
}
SUFFIXES = (".png", ".pdf", ".svg")
_BESIDE = 6
"""Lines whose names fit beside the picture; more stand below it."""
_CYCLE = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")


def default_measure(reports: Sequence[Report]) -> str:
    """What says most: of questions that people asked, which a small model answers rarely, the loss; else right answers.

    Where nothing is right with the full context there is no share of it.
    """
    if all(report.get("task") == "squad" for report in reports):
        return "recovered"
    shares = [row.get("share_of_full") for report in reports for row in report["rows"]]
    return "share_of_full" if any(share is not None for share in shares) else "contained"


def check_picture(path: str | Path) -> None:
    """Refuse early what ``plot_reports`` could not write: an evaluation may take hours before it draws.

    Raises:
        ValueError: the folder does not exist, or the suffix is none of ``SUFFIXES``.
        ImportError: matplotlib is missing.
    """
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise ValueError(f"plot: {path.parent} is not an existing folder; expected one to write {path.name} into")
    if path.suffix not in SUFFIXES or path.is_dir():
        raise ValueError(f"plot: got {str(path)!r}, expected a file that ends in {', '.join(SUFFIXES)}")
    if find_spec("matplotlib") is None:
        raise ImportError("plot: needs the library 'matplotlib'; install condense-core[bench]")


def plot_reports(reports: Sequence[Report], path: str | Path, *, measure: str | None = None) -> None:
    """Draw a line for each method over the compression, with the 95% intervals that the reports have.

    Args:
        reports: as ``comparison.read_report`` gives them, or ``report.run_evaluation``.
        path: of the picture; its suffix, one of ``SUFFIXES``, says the format.
        measure: one of ``MEASURES``; None: ``default_measure``.

    Raises:
        ValueError, ImportError: there is no such measure, nothing to draw, or as from ``check_picture``.
    """
    check_picture(path)
    measure = default_measure(reports) if measure is None else measure
    if measure not in MEASURES:
        raise ValueError(f"measure: got {measure!r}, expected one of {', '.join(MEASURES)}")
    lines = _lines(reports, measure)
    if not lines:
        raise ValueError("reports: nothing to draw; expected rows of a method beside the controls")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    many = len(lines) > _BESIDE
    figure, axes = plt.subplots(figsize=(8, 6.2 if many else 4.8), layout="constrained")
    if measure == "contained":
        for row in (row for report in reports[:1] for row in report["rows"] if row["method"] in CONTROLS):
            label = {"full": "full context", "none": "no context"}[row["method"]]
            axes.axhline(
                100 * row[measure], color="black", linewidth=1, linestyle=("--", ":")[label[0] == "n"], label=label
            )
    else:
        axes.axhline(100, color="black", linewidth=1, linestyle="--", label="full context")
        axes.axhline(
            0, color="black", linewidth=1, linestyle=":", label="no context" if measure == "recovered" else None
        )
    # Lines stand side by side at each compression, so that their intervals do not hide each other.
    for number, (name, points) in enumerate(lines.items()):
        shift = 1.0 + 0.012 * (number - (len(lines) - 1) / 2)
        x = [size * shift for size, *_ in points]
        y = [100 * value for _, value, _, _ in points]
        errors = [
            [100 * (value - low) for _, value, low, _ in points],
            [100 * (high - value) for _, value, _, high in points],
        ]
        axes.errorbar(
            x,
            y,
            yerr=errors,
            fmt=f"{_CYCLE[number % len(_CYCLE)]}-",
            markersize=5,
            capsize=3,
            linewidth=1.4,
            label=name,
        )
    ticks = sorted({size for points in lines.values() for size, *_ in points})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:.3g}x" for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.set(xlabel="compression", ylabel=f"{MEASURES[measure]}, %", title=_title(reports))
    if measure != "recovered":
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if many:
        figure.legend(frameon=False, loc="outside lower center", ncols=2)
    else:
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    try:
        figure.savefig(path, dpi=120)
    finally:
        plt.close(figure)


def _lines(reports: Sequence[Report], measure: str) -> dict[str, list[tuple[float, float, float, float]]]:
    """``(compression, value, low, high)`` by method, ascending; the same method of a second report has its number."""
    lines: dict[str, list[tuple[float, float, float, float]]] = defaultdict(list)
    for number, report in enumerate(reports):
        earlier = {row["method"] for other in reports[:number] for row in other["rows"]}
        for row in report["rows"]:
            value: Any = row.get(measure)
            if row["method"] in CONTROLS or row.get("not_possible") or value is None:
                continue
            name = f"{row['method']} ({number + 1})" if row["method"] in earlier else row["method"]
            low, high = (row.get("intervals") or {}).get(measure) or (value, value)
            size = 1 / size_of(row) if "keep" in row else size_of(row)
            lines[name].append((size, value, min(low, value), max(high, value)))
    return {name: sorted(points) for name, points in lines.items()}


def _title(reports: Sequence[Report]) -> str:
    first = reports[0]
    questions, contexts = max((r["questions"], r["contexts"]) for r in reports)
    low, high = first["context_chars"]
    return f"{first['model']}: {questions} questions about {contexts} texts of {low:,} to {high:,} characters"
