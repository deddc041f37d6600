"""What a run measured, as numbers: exact percentiles over all requests, a series over time, and the server's memory."""

from __future__ import annotations

import math
import os
import platform
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from condense_core._version import __version__
from condense_core.profiling.processor import processor
from condense_core.serving.load.driver import LOST, OK, UNFINISHED, Run, Sample

PERCENTILES = (50.0, 90.0, 99.0, 99.9)
REFUSALS = ("queue_full", "rate_limited", "shutting_down")
"""Codes of requests that the server did not accept, and may accept later."""

_LAG_SHARE, _LAG_MS = 0.1, 5.0
"""A driver keeps up whose lag is at most this share of the median latency at the median, and at most so many
milliseconds at the 99th percentile."""

_LEAST_SECONDS = 29.0  # that a growth of memory is told of: half of a run of a minute, looked at each second

Record = dict[str, Any]


def percentile(ascending: Sequence[float], percent: float) -> float:
    """The smallest value that at least ``percent`` of all are not above: one that was measured, never between two."""
    rank = math.ceil(len(ascending) * percent / 100 - 1e-9)
    return ascending[max(rank, 1) - 1]


def distribution(seconds: Iterable[float]) -> dict[str, float]:
    """Count, mean, percentiles and maximum, in milliseconds; of nothing, the count alone."""
    found = sorted(seconds)
    if not found:
        return {"count": 0}
    facts = {"count": len(found), "mean": sum(found) / len(found)}
    facts |= {f"p{percent:g}": percentile(found, percent) for percent in PERCENTILES}
    facts["max"] = found[-1]
    return {name: value if name == "count" else round(1e3 * value, 3) for name, value in facts.items()}


def record_of(run: Run) -> Record:
    """All that is kept of a run, as JSON.

    Latencies begin when a request was due; those ``from_sending`` when the driver came to send it. Overhead begins with
    sending, and leaves out what the server says that it computed: see ``overhead``.
    """
    ended = [sample for sample in run.samples if sample.outcome != UNFINISHED]
    by_outcome: dict[str, list[Sample]] = defaultdict(list)
    for sample in ended:
        by_outcome[sample.outcome].append(sample)
    refused = [sample for code in REFUSALS for sample in by_outcome[code]]
    good = by_outcome[OK]
    record: Record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"condense_core": __version__, "python": platform.python_version()},
        "machine": {"cpu": processor(), "cores": os.cpu_count()},
        "settings": run.settings.describe() | {"salt": run.salt},
        "offered": {name: run.offered.get(name) for name in ("id", "device", "dtype", "default_method")},
        "interrupted": run.interrupted,
        "seconds": round(run.seconds, 3),
        "counts": {
            "due": len(run.samples),
            "unfinished": len(run.samples) - len(ended),
            **{outcome: len(samples) for outcome, samples in sorted(by_outcome.items()) if samples},
        },
        "lost": sum(len(by_outcome[outcome]) for outcome in LOST),
        "refused": len(refused),
        "missed_deadline": len(by_outcome["deadline_exceeded"]) + sum(s > run.settings.timeout for s in _sent(good)),
        "cached": sum("cached" in sample.timing for sample in good),
        "latency_ms": {outcome: distribution(map(_latency, samples)) for outcome, samples in by_outcome.items()},
        "from_sending_ms": {outcome: distribution(_sent(samples)) for outcome, samples in by_outcome.items()},
        "refusal_ms": {"latency": distribution(map(_latency, refused)), "from_sending": distribution(_sent(refused))},
        **overhead(good),
        "throughput": throughput(run, ended),
        "driver": lag(run.samples, good),
        "memory": memory([(look.at, look.rss) for look in run.looks if look.rss is not None]),
        "queue": _queue(run),
        "series": series(run),
    }
    for name in ("latency_ms", "from_sending_ms"):
        record[name] = dict(sorted((item for item in record[name].items() if item[1]["count"]), key=_ok_first))
    return record


def overhead(good: Iterable[Sample]) -> dict[str, Any]:
    """What answers took beyond the engine, and where they spent their time in it; answers from its cache left out.

    ``overhead_ms``: from sending, less ``queue``, ``tokenize`` and ``run``. ``overhead_alone_ms``: of requests that
    were the only one on their way, less ``tokenize`` and ``run`` alone: there was nobody to wait for.
    """
    timed = [sample for sample in good if "run" in sample.timing and sample.sent_at is not None]
    alone = [sample for sample in timed if sample.alone]
    stages = list(dict.fromkeys(stage for sample in timed for stage in sample.timing))
    return {
        "overhead_ms": distribution(_beyond(sample, "queue", "tokenize", "run") for sample in timed),
        "overhead_alone_ms": distribution(_beyond(sample, "tokenize", "run") for sample in alone),
        "stages_ms": {
            stage: distribution(s.timing[stage] for s in timed if stage in s.timing)
            for stage in stages
            if re.fullmatch(r"[a-z_]{1,20}", stage)
        },
    }


def throughput(run: Run, ended: Sequence[Sample]) -> dict[str, float]:
    """A second: answers of any kind, contexts, and tokens of these, of what ended while requests still began."""
    until = min(run.seconds, max((s.done_at for s in ended if s.done_at is not None), default=0.0))
    within = [s for s in ended if s.done_at is not None and s.done_at <= until]
    good = [s for s in within if s.outcome == OK]
    answered = sum(s.outcome not in LOST for s in within)
    figures = {
        "answers_per_second": answered,
        "contexts_per_second": len(good),
        "input_tokens_per_second": sum(s.tokens for s in good),
    }
    return {"seconds": round(until, 3)} | {name: round(n / until, 3) if until else 0.0 for name, n in figures.items()}


def lag(samples: Iterable[Sample], good: Sequence[Sample]) -> dict[str, Any]:
    """How late the driver sent what was due, and whether that is too late to trust the latencies."""
    late = distribution(s.sent_at - s.due_at for s in samples if s.sent_at is not None)
    if not late["count"]:
        return {"lag_ms": late, "kept_up": True}
    usual = distribution(map(_latency, good)).get("p50", math.inf)
    return {"lag_ms": late, "kept_up": late["p50"] <= _LAG_SHARE * usual and late["p99"] <= _LAG_MS}


def memory(sampled: Sequence[tuple[float, float]]) -> dict[str, float | None] | None:
    """Resident memory of the server's process in MB: at first, at most and at last; None where it did not say.

    ``slope_mb_per_minute`` is that of the line through the second half: a server fills its caches in the first. It is
    None where the second half has less than 29 seconds, in which chance decides.
    """
    if not sampled:
        return None
    later = [(at, rss) for at, rss in sampled if at >= sampled[-1][0] / 2]
    mean_at, mean_rss = (sum(values) / len(later) for values in zip(*later, strict=True))
    spread = sum((at - mean_at) ** 2 for at, _ in later)
    slope = sum((at - mean_at) * (rss - mean_rss) for at, rss in later) / spread if spread else 0.0
    known = later[-1][0] - later[0][0] >= _LEAST_SECONDS
    found = {"start_mb": sampled[0][1], "max_mb": max(rss for _, rss in sampled), "end_mb": sampled[-1][1]}
    in_mb: dict[str, float | None] = {name: round(value / 1e6, 3) for name, value in found.items()}
    return in_mb | {"slope_mb_per_minute": round(60 * slope / 1e6, 3) if known else None}


def series(run: Run) -> dict[str, list[float | int | None]]:
    """For each second of the run: arrivals by when they were due, all else by when it ended, the server as it was then.

    ``p50`` and ``p99`` are latencies of contexts in milliseconds; None where there is nothing to tell.
    """
    events = [s.due_at for s in run.samples] + [s.done_at for s in run.samples if s.done_at is not None]
    count = int(max(events, default=-1.0)) + 1
    rows: dict[str, list[float | int | None]] = {name: [0] * count for name in ("arrivals", "ok", "refused", "failed")}
    rows |= {name: [None] * count for name in ("p50_ms", "p99_ms", "rss_mb", "waiting", "running")}
    latencies: dict[int, list[float]] = defaultdict(list)
    ends: dict[str, dict[int, int]] = {name: defaultdict(int) for name in ("arrivals", "ok", "refused", "failed")}
    for sample in run.samples:
        ends["arrivals"][int(sample.due_at)] += 1
        if sample.done_at is not None:
            refused = sample.outcome in REFUSALS
            ends["ok" if sample.outcome == OK else "refused" if refused else "failed"][int(sample.done_at)] += 1
            if sample.outcome == OK:
                latencies[int(sample.done_at)].append(_latency(sample))
    for name, counted in ends.items():
        for second, number in counted.items():
            rows[name][second] = number
    for second, found in latencies.items():
        found.sort()
        for name, percent in (("p50_ms", 50.0), ("p99_ms", 99.0)):
            rows[name][second] = round(1e3 * percentile(found, percent), 3)
    for look in run.looks:
        if int(look.at) < count:
            rows["rss_mb"][int(look.at)] = None if look.rss is None else round(look.rss / 1e6, 3)
            rows["waiting"][int(look.at)], rows["running"][int(look.at)] = look.waiting, look.running
    return {"second": list(range(count)), **rows}


def _latency(sample: Sample) -> float:
    assert sample.done_at is not None
    return sample.done_at - sample.due_at


def _sent(samples: Iterable[Sample]) -> Iterator[float]:
    return (s.done_at - s.sent_at for s in samples if s.done_at is not None and s.sent_at is not None)


def _beyond(sample: Sample, *stages: str) -> float:
    assert sample.done_at is not None
    assert sample.sent_at is not None
    return sample.done_at - sample.sent_at - sum(sample.timing.get(stage, 0.0) for stage in stages)


def _ok_first(item: tuple[str, Any]) -> tuple[bool, str]:
    return item[0] != OK, item[0]


def _queue(run: Run) -> dict[str, int | None]:
    """How many requests waited before, at most, and behind the run."""
    waiting = [look.waiting for look in run.looks]
    return {
        "start": waiting[0] if waiting else None,
        "max": max((count for count in waiting if count is not None), default=None),
        "end": waiting[-1] if waiting else None,
    }
