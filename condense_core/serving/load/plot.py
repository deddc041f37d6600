"""A run over time, as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from condense_core.serving.load.table import title
from condense_core.tasks.plot import check_picture

_MANY = 120  # seconds beyond which points are joined by thinner lines
_WIDE = 10  # ratio of latencies beyond which their axis is logarithmic


def plot_load(record: Mapping[str, Any], path: str | Path) -> None:
    """Latency, rates, and memory and queue of the server over the seconds of a run.

    Args:
        record: of ``record_of``. path: of the picture; its suffix says the format.

    Raises:
        ValueError, ImportError: nothing was measured, or as from ``check_picture``.
    """
    check_picture(path)
    rows = record["series"]
    seconds = rows["second"]
    if not seconds:
        raise ValueError("plot: nothing was measured; expected a run of at least one request")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    figure, (latency, rates, server) = plt.subplots(3, 1, figsize=(9, 8), sharex=True, layout="constrained")
    style: dict[str, Any] = {"linewidth": 1.0 if len(seconds) > _MANY else 1.6}
    figure.suptitle(title(record), fontsize=10)

    for name, label, colour in (("p99_ms", "p99", "#c23b75"), ("p50_ms", "p50", "#1f6fb2")):
        latency.plot(*_known(seconds, rows[name]), ".-", color=colour, label=label, markersize=4, **style)
    times = [value for name in ("p50_ms", "p99_ms") for value in rows[name] if value]
    if times and max(times) > _WIDE * min(times):
        latency.set_yscale("log")
        latency.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        latency.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
        latency.yaxis.set_minor_locator(ticker.NullLocator())
    else:
        latency.set_ylim(bottom=0)
    latency.set(ylabel="latency, ms")

    rates.step(seconds, rows["arrivals"], where="mid", color="#8c8c8c", label="arrivals", **style)
    for name, colour in (("ok", "#2a9d5c"), ("refused", "#d9822b"), ("failed", "#c0232c")):
        if name == "ok" or any(rows[name]):
            rates.step(seconds, rows[name], where="mid", color=colour, label=name, **style)
    rates.set(ylabel="requests a second")
    rates.set_ylim(bottom=0)

    at, memory = _known(seconds, rows["rss_mb"])
    server.plot(at, memory, color="#7b4fb5", label="memory", **style)
    if memory:  # at least a tenth of it, so that noise does not look like growth
        middle, half = (max(memory) + min(memory)) / 2, max(0.55 * (max(memory) - min(memory)), 0.05 * max(memory))
        server.set_ylim(middle - half, middle + half)
    server.set(ylabel="memory, MB", xlabel="seconds")
    queue = server.twinx()
    queue.fill_between(*_known(seconds, rows["waiting"]), color="#8c8c8c", alpha=0.35, linewidth=0, label="waiting")
    queue.set(ylabel="requests that wait")
    queue.set_ylim(bottom=0, top=max(5, *(count or 0 for count in rows["waiting"])) * 1.05)
    server.set_zorder(queue.get_zorder() + 1)  # the line before the area
    server.patch.set_visible(False)
    for axes in (latency, rates, server):
        axes.grid(alpha=0.3)
        handles, labels = axes.get_legend_handles_labels()
        if axes is server:
            more, names = queue.get_legend_handles_labels()
            handles, labels = handles + more, labels + names
        axes.legend(handles, labels, frameon=False, ncols=len(labels), loc="lower right", bbox_to_anchor=(1.0, 1.0))
    server.set_xlim(-0.5, seconds[-1] + 0.5)
    try:
        figure.savefig(path, dpi=120)
    finally:
        plt.close(figure)


def _known(seconds: list[int], values: list[float | None]) -> tuple[list[int], list[float]]:
    """The points that there are."""
    points = [(second, value) for second, value in zip(seconds, values, strict=True) if value is not None]
    return [second for second, _ in points], [value for _, value in points]
