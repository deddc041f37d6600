"""Training logs as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def read_log(path: Path) -> Rows:
    """The rows of a ``log.jsonl``; of a step logged twice (a run cut off and resumed) the later one."""
    if not path.exists():
        return []
    rows = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        rows[row["step"], "eval" in row] = row
    return [rows[key] for key in sorted(rows)]


def plot_curves(curves: dict[str, Rows], path: Path) -> None:
    """Answer loss over steps: the LM alone, the LM with its compressors by method and ratio, each compressor alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), constrained_layout=True)
    for key in ("full", "text"):
        _line(axes[0], curves.get("lm", []), key, {"full": "answers, full context", "text": "running text"}[key])
    axes[0].set_title("language model")
    colours = {"pool": "C0", "mean": "C1", "memory": "C2"}
    for method, colour in colours.items():
        for ratio, style in ((4, "-"), (8, "--"), (16, ":")):
            rows = curves.get("cotrain", [])
            _line(axes[1], rows, f"{method}/{ratio}/que", f"{method} {ratio}x", color=colour, linestyle=style)
    _line(axes[1], curves.get("cotrain", []), "full", "full context", color="black")
    axes[1].set_title("language model with compressors: answers")
    for method, colour in colours.items():
        rows = curves.get(method, [])
        separate = any("ce/question" in row for row in rows)  # older runs logged the mixture only
        _line(axes[2], rows, "ce/question" if separate else "ce", method, color=colour)
    axes[2].set_title("compressors, model frozen: " + ("answers" if separate else "tasks mixed as drawn"))
    for axis in axes:
        axis.set_xlabel("step")
        axis.set_ylabel("nats per token")
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
        if axis.has_data():
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _line(axis: Any, rows: Rows, key: str, label: str, *, span: int = 5, **style: Any) -> None:
    """``key`` over steps as a running mean over ``span`` logged values; rows without it are skipped."""
    points = [(row["step"], row[key]) for row in rows if key in row]
    if not points:
        return
    steps = [step for step, _ in points]
    values = [v for _, v in points]
    smooth = [
        sum(values[max(0, i - span + 1) : i + 1]) / len(values[max(0, i - span + 1) : i + 1])
        for i in range(len(values))
    ]
    axis.plot(steps, smooth, label=label, **style)
