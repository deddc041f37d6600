"""What serving adds to compressing, and how a server bears load: `python -m bench.serve`.

    python -m bench.serve [--only overhead,soak,overload] [--minutes 10] [--threads N] [--out FOLDER]

Each experiment starts `condense serve` with the embedded model in a process of its own, puts it under the load of
`condense bench serve` from this one, and writes `serve-<experiment>.json`:

- overhead: arrivals at a tenth of what the server can do; what answers took beyond the engine's own compute, of
  requests that nobody was in the way of.
- soak: 64 clients that ask again as soon as they are answered; errors, lost requests and the growth of memory.
- overload: arrivals at three times what the server can do, each with a second to be answered in; how long refusals
  took, and how many accepted requests missed their second.

Run it on a quiet machine: server and driver share its cores, as a server and a proxy before it do.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from bench.goal import Goal, sentence
from condense_core.serving.load.driver import drive
from condense_core.serving.load.record import Record, record_of
from condense_core.serving.load.settings import LoadSettings

CLIENTS = 64
CACHE_MB = 16
"""Of results, so that the cache is full early in a soak and does not pass for a leak."""
DEADLINE = 1.0
_LOW, _HIGH = 0.1, 3.0  # of the capacity
_MOST = {"overhead": 4.0, "soak": float("inf"), "overload": 1.0}
"""Minutes of each experiment, where more were asked for."""
_PROBE_SECONDS = 10.0
_START_SECONDS = 120.0
_CONDENSE = (sys.executable, "-c", "import sys; from condense_core.cli import main; sys.exit(main())")


@contextmanager
def server(*options: str) -> Iterator[str]:
    """`condense serve` with the embedded model on a free port; yields its URL, and tells it to end afterwards.

    Raises:
        RuntimeError: it did not start, or did not end well.
    """
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        process = subprocess.Popen([*_CONDENSE, "serve", "--port", "0", *options], stderr=log)
        try:
            yield _address(process, Path(log.name))
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                ended = process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                ended = process.wait()
        if ended not in (0, -signal.SIGTERM):
            raise RuntimeError(f"the server ended with {ended}: {Path(log.name).read_text()[-1000:]}")


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    until = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < until:
        if found := re.search(r"; (http://\S+)", log.read_text()):
            return found[1]
        time.sleep(0.1)
    raise RuntimeError(f"the server did not start: {log.read_text()[-1000:]}")


def capacity(url: str, seconds: float) -> float:
    """Contexts a second that four clients get, who ask again as soon as they are answered."""
    drive(LoadSettings(server=url, concurrency=4, requests=20, timeout=60))  # what only the first ones take
    found = record_of(drive(LoadSettings(server=url, concurrency=4, duration=seconds, timeout=60, seed=1)))
    return float(found["throughput"]["contexts_per_second"])


def overhead(url: str, seconds: float) -> Record:
    """Arrivals at a tenth of the capacity."""
    most = capacity(url, min(_PROBE_SECONDS, seconds))
    run = drive(LoadSettings(server=url, rate=max(_LOW * most, 0.5), duration=seconds, timeout=60))
    found = record_of(run)
    beyond = found["overhead_alone_ms"]
    goals = [
        Goal("ms", 3.0, "over compute at the median").judge(beyond.get("p50")),
        Goal("ms", 10.0, "at the 99th percentile").judge(beyond.get("p99")),
    ]
    return {"capacity_per_second": most, "goals": goals, **found}


def soak(url: str, seconds: float) -> Record:
    """64 clients."""
    found = record_of(drive(LoadSettings(server=url, concurrency=CLIENTS, duration=seconds, timeout=60)))
    counts = found["counts"]
    errors = counts["due"] - counts["unfinished"] - counts.get("ok", 0) - found["lost"]
    slope = None if found["memory"] is None else found["memory"]["slope_mb_per_minute"]
    goals = [
        Goal("count", 0, "errors").judge(errors),
        Goal("count", 0, "lost requests").judge(found["lost"]),
        Goal("growth", 1.0).judge(slope),
    ]
    return {"goals": goals, **found}


def overload(url: str, seconds: float) -> Record:
    """Arrivals at three times the capacity."""
    most = capacity(url, min(_PROBE_SECONDS, seconds))
    found = record_of(drive(LoadSettings(server=url, rate=_HIGH * most, duration=seconds, timeout=DEADLINE)))
    served = found["throughput"]["contexts_per_second"]
    goals = [
        Goal("ms", 50.0, "for the slowest refusal").judge(found["refusal_ms"]["from_sending"].get("max")),
        Goal("count", 0, "accepted requests past their deadline").judge(found["missed_deadline"]),
    ]
    times = round(_HIGH * most / served, 2) if served else None
    return {"capacity_per_second": most, "times_served": times, "goals": goals, **found}


EXPERIMENTS: dict[str, Callable[[str, float], Record]] = {
    "overhead": overhead,
    "soak": soak,
    "overload": overload,
}


def measure(name: str, options: argparse.Namespace) -> Record:
    """One experiment, against a server of its own."""
    threads = [] if options.threads is None else ["--threads", str(options.threads)]
    seconds = 60 * min(options.minutes, _MOST[name])
    with server("--cache-mb", str(CACHE_MB), *threads) as url:
        found = EXPERIMENTS[name](url, seconds)
    found["versions"]["torch"] = version("torch")
    return {"experiment": name, "threads": options.threads, "cache_mb": CACHE_MB, **found}


def table(results: Path) -> str:
    """The experiments that were recorded, in Markdown; a sentence where none was."""
    records = [json.loads(path.read_text()) for name in EXPERIMENTS if (path := _path(results, name)).exists()]
    if not records:
        return "No record is here yet: `python -m bench.serve` makes one."
    lines = [
        "| experiment | load | requests | ok, ms: median, 99% | refused, ms: median, slowest | goals |",
        "|---" * 6 + "|",
    ]
    heads = []
    for record in records:
        settings, machine = record["settings"], record["machine"]
        rate = settings["rate"]
        load = f"{settings['concurrency']} clients" if rate is None else f"{rate:.3g} a second"
        if record.get("times_served") is not None:
            load += f" ({record['times_served']:.1f}x what was served)"
        good = record["latency_ms"].get("ok", {"count": 0})
        refused = record["refusal_ms"]["from_sending"]
        cells = [
            record["experiment"],
            f"{load} for {record['seconds'] / 60:.3g} min",
            f"{record['counts']['due']:,}",
            _ms(good, "p99"),
            _ms(refused, "max"),
            "; ".join(map(sentence, record["goals"])),
        ]
        lines.append(f"| {' | '.join(cells)} |")
        offered = record["offered"]
        least, most = settings["mix"]["chars"]
        head = (
            f"{offered['id']}, {offered['dtype']}, {offered['device']}; texts of {least:,} to {most:,} characters; "
            f"{machine['cpu']}, {machine['cores']} cores; {record['date'][:10]}; torch {record['versions']['torch']}; "
        )
        heads.append((head, f"`bench/results/{_path(results, record['experiment']).name}`"))
    files = {head: ", ".join(file for other, file in heads if other == head) for head, _ in heads}
    return "\n".join([*(f"{head}{names}.\n" for head, names in files.items()), *lines])


def _ms(found: dict[str, float], last: str) -> str:
    """The median and another figure of a distribution."""
    figures = [found[name] for name in ("p50", last)] if found["count"] else []
    return ", ".join(f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in figures)


def _path(results: Path, name: str) -> Path:
    return results / f"serve-{name}.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; 1 if a goal was missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.serve", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", help="comma-separated experiments (default: all)")
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="of the soak; at most 4 of overhead and 1 of overload (default: 10)"
    )
    parser.add_argument("--threads", type=int, help="of the server (default: one for each core)")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the records")
    options = parser.parse_args(argv)
    chosen = options.only.split(",") if options.only else list(EXPERIMENTS)
    if unknown := sorted(set(chosen) - set(EXPERIMENTS)):
        parser.error(f"--only: {', '.join(unknown)}, expected some of {', '.join(EXPERIMENTS)}")
    if not 0 < options.minutes <= 24 * 60:
        parser.error(f"--minutes: {options.minutes:g}, expected a number above 0 and at most {24 * 60}")
    options.out.mkdir(parents=True, exist_ok=True)
    met = True
    for name in chosen:
        print(f"== {name}", flush=True)
        found = measure(name, options)
        # A key a line: a series of 600 seconds would else be as many lines, several times.
        text = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
        _path(options.out, name).write_text(f"{{\n{text}\n}}\n")
        print("\n".join(map(sentence, found["goals"])), flush=True)
        if not found["driver"]["kept_up"]:
            print("note: the driver could not keep up")
        if (times := found.get("times_served")) is not None and times < _HIGH / 2:
            print(f"note: {times:.1f}x of what was served came, expected about {_HIGH:g}x: the machine was not quiet")
        met = met and all(goal["met"] for goal in found["goals"])
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
