"""Exact matches over the kept share, from a report of `condense eval --pruning -o report.json`.

python bench/pruning_plot.py report.json docs/pruning_accuracy.png
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

# A reader can follow so many lines; the others are in the table.
SHOWN = {
    "query_aware": "#9cc4e4",
    "compactor": "#d9822b",
    "expected_attention": "#a3781c",
    "lagkv": "#7b4fb5",
    "non_causal": "#2a9d5c",
    "criticalkv(snapkv)": "#c23b75",
    "snapkv": "#1f6fb2",
    "random": "#8c8c8c",
}


def plot(report: dict[str, Any], path: Path) -> None:
    """A line for each method, the full cache as a level."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in report["rows"]:
        exact = row["exact_match"] if "exact_match" in row else row["accuracy"]  # its name in version 0.1
        if exact is not None:  # the method cannot prune to this share
            lines[row["method"]].append((row["keep"], exact))
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    full = lines["full"][0][1]
    axes.axhline(100 * full, color="black", linewidth=1, linestyle="--", label=f"full cache: {full:.0%}")
    for name, colour in SHOWN.items():
        if name in lines:
            shares, accuracies = zip(*sorted(lines[name]), strict=True)
            wide = 6 if name == "query_aware" else 1.5  # it lies under others
            points = [100 * s for s in shares], [100 * a for a in accuracies]
            axes.plot(*points, "o-", color=colour, label=name, linewidth=wide)
    axes.set(xlabel="tokens kept, %", ylabel="exact match, %", ylim=(0, 105))
    axes.set_title(f"{report['questions']} questions about texts of {report['context_chars'][1]:,} characters")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    plot(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
