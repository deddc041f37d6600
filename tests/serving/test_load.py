"""The driver of load: when it sends, what it counts from when, and what it says of a server and of itself."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import islice
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
import torch

from condense_core.cli import main
from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.serving.engine import CompressionEngine, EngineLimits
from condense_core.serving.http.app import create_app
from condense_core.serving.keys import Keys, new_key
from condense_core.serving.load.driver import Look, Run, Sample, drive
from condense_core.serving.load.mix import LogUniform, RecordedMix, Requests, poisson_times
from condense_core.serving.load.plot import plot_load
from condense_core.serving.load.record import distribution, memory, percentile, record_of
from condense_core.serving.load.settings import LoadSettings
from condense_core.serving.prometheus import PrometheusObserver
from condense_core.serving.service import LocalService
from condense_testing.running_server import running_server
from condense_testing.serving import FakeBackend

SOFT = SoftTokens(torch.ones(1, 2), num_context_tokens=7, ratio=7, model_id="scripted").to_bytes()
GOOD = (200, SOFT, "")

# -- what is asked -----------------------------------------------------------------------------------------------------


def test_arrivals_are_poisson_and_a_seed_s_own() -> None:
    times = list(islice(poisson_times(50.0, 3), 20_000))
    gaps = np.diff([0.0, *times])
    # The mean of n exponential gaps has a standard error of mean / sqrt(n): 0.7%.
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.05)  # an exponential's is its mean
    counts = np.bincount(np.array(times).astype(int))[:-1]
    assert counts.var() == pytest.approx(50, rel=0.25)  # a Poisson count's is its mean
    assert times == list(islice(poisson_times(50.0, 3), 20_000))
    assert times != list(islice(poisson_times(50.0, 4), 20_000))


def asked(count: int, **options: Any) -> list[dict[str, Any]]:
    requests = Requests(**{"mix": LogUniform(), "seed": 1, "salt": "salt", "timeout": 5} | options)
    return [json.loads(requests.body(number)) for number in range(count)]


def test_lengths_are_those_of_the_mix_and_no_text_comes_twice() -> None:
    made = asked(2000, ratio=8)
    lengths = [len(each["text"]) for each in made]
    assert min(lengths) >= 500
    assert max(lengths) <= 7000
    assert np.median(lengths) == pytest.approx(1871, rel=0.1)
    assert np.mean(lengths) == pytest.approx(2463, rel=0.05)
    assert len({each["text"] for each in made}) == 2000
    assert {(each["ratio"], each["timeout"], "method" in each) for each in made} == {(8, 5, False)}
    assert made == asked(2000, ratio=8)
    other = asked(2000, ratio=8, salt="other")  # a second run: the same lengths, none of the texts
    assert [len(each["text"]) for each in other] == lengths
    assert not {each["text"] for each in other} & {each["text"] for each in made}


def test_a_share_of_the_requests_comes_again_soon_after() -> None:
    texts = [each["text"] for each in asked(2000, repeat=0.3)]
    again = [i for i, text in enumerate(texts) if text in texts[:i]]
    assert len(again) / 2000 == pytest.approx(0.3, abs=0.05)
    assert all(texts[i] in texts[max(i - 500, 0) : i] for i in again)


def test_a_recorded_mix_is_drawn_by_its_weights(tmp_path: Path) -> None:
    path = tmp_path / "mix.jsonl"
    path.write_text(
        '{"chars": 100, "weight": 3}\n\n{"chars": 30000, "method": "select", "ratio": 2.5, "question": "Who?"}\n'
        '{"chars": 99, "weight": 0}\n'
    )
    made = asked(1000, mix=RecordedMix.load(path), method="pool", ratio=4)
    short = [each for each in made if len(each["text"]) == 100]
    long = [each for each in made if len(each["text"]) == 30_000]
    assert len(short) + len(long) == 1000
    assert len(short) / 1000 == pytest.approx(0.75, abs=0.06)
    assert {(each["method"], each["ratio"], each.get("question")) for each in short} == {("pool", 4, None)}
    assert {(each["method"], each["ratio"], each["question"]) for each in long} == {("select", 2.5, "Who?")}


# -- what is counted ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7, 101, 1001, 4321])
def test_percentiles_are_values_that_were_measured_as_numpy_has_them(count: int) -> None:
    rng = random.Random(count)
    values = sorted(rng.lognormvariate(0, 2) for _ in range(count))
    found = distribution(values)
    for percent in (50.0, 90.0, 99.0, 99.9):
        expected = float(np.percentile(values, percent, method="inverted_cdf"))
        assert percentile(values, percent) == expected
        assert found[f"p{percent:g}"] == round(1e3 * expected, 3)
    assert (found["count"], found["max"]) == (count, round(1e3 * values[-1], 3))
    assert distribution([]) == {"count": 0}
    assert [percentile(range(1, 1001), percent) for percent in (0.05, 50.0, 99.9, 100.0)] == [1, 500, 999, 1000]


def test_memory_is_judged_by_its_second_half() -> None:
    filling = [(float(t), 1e8 + 1e6 * min(t, 30)) for t in range(61)]
    found = memory(filling)
    assert found == {"start_mb": 100, "max_mb": 130, "end_mb": 130, "slope_mb_per_minute": 0}
    leaking = memory([(float(t), 1e8 + 1e5 * t) for t in range(61)])
    assert leaking is not None
    assert leaking["slope_mb_per_minute"] == pytest.approx(6)
    short = memory([(0.0, 1e8), (10.0, 2e8)])
    assert short == {"start_mb": 100, "max_mb": 200, "end_mb": 200, "slope_mb_per_minute": None}
    assert memory([]) is None


def sample(number: int, due: float, sent: float, done: float, outcome: str = "ok", **fields: Any) -> Sample:
    return Sample(number, due, sent, done, outcome, **fields)


def test_a_record_counts_outcomes_refusals_overhead_and_seconds() -> None:
    run = Run(LoadSettings(rate=4, duration=3, timeout=1), "salt", {"id": "m", "digest": "not kept"}, seconds=3)
    timing = {"queue": 0.1, "tokenize": 0.02, "run": 0.3, "write": 0.001}
    run.samples = [
        sample(0, 0.5, 0.5, 1.0, tokens=100, timing=timing),
        sample(1, 0.6, 0.7, 1.2, tokens=200, timing=timing, alone=False),
        sample(2, 1.5, 1.5, 1.51, "queue_full"),
        sample(3, 1.6, 1.65, 1.7, "queue_full"),
        sample(4, 1.7, 1.7, 2.75, tokens=50, timing={"cached": 0.0}),  # beyond its deadline of 1 s
        sample(5, 2.0, 2.0, 3.0, "deadline_exceeded"),
        sample(6, 2.1, 2.1, 2.2, "connection_error"),
        sample(7, 2.2, 2.2, 13.2, "no_answer"),
        Sample(8, 2.9),
    ]
    run.looks = [Look(0.0, 0, 0, 1e8), Look(1.0, 4, 1, 2e8), Look(2.0), Look(13.3, 0, 0, 1.5e8)]
    found = json.loads(json.dumps(record_of(run)))
    assert found["counts"] == {
        "due": 9,
        "unfinished": 1,
        "ok": 3,
        "queue_full": 2,
        "deadline_exceeded": 1,
        "connection_error": 1,
        "no_answer": 1,
    }
    assert (found["lost"], found["refused"], found["missed_deadline"], found["cached"]) == (2, 2, 2, 1)
    assert next(iter(found["latency_ms"])) == "ok"
    assert found["latency_ms"]["ok"]["max"] == 1050
    assert found["latency_ms"]["ok"]["p50"] == 600
    assert found["from_sending_ms"]["ok"]["p50"] == 500
    assert (found["refusal_ms"]["latency"]["max"], found["refusal_ms"]["from_sending"]["max"]) == (100, 50)
    assert found["overhead_ms"]["p50"] == pytest.approx(80)
    # Of the only one that was alone, waiting counts as well.
    assert (found["overhead_alone_ms"]["count"], found["overhead_alone_ms"]["p50"]) == (1, pytest.approx(180))
    assert found["stages_ms"]["run"]["max"] == 300
    # Within the 2.75 s... 3 s in which requests began, seven ended, one of them lost.
    assert found["throughput"] == {
        "seconds": 3,
        "answers_per_second": 2,
        "contexts_per_second": 1,
        "input_tokens_per_second": pytest.approx(350 / 3, abs=1e-3),
    }
    assert found["driver"]["lag_ms"]["max"] == 100
    assert not found["driver"]["kept_up"]
    rows = found["series"]
    assert rows["second"] == list(range(14))
    assert rows["arrivals"][:4] == [2, 3, 4, 0]
    assert (rows["ok"][:4], rows["refused"][:4], rows["failed"][:4]) == ([0, 2, 1, 0], [0, 2, 0, 0], [0, 0, 1, 1])
    assert (rows["p50_ms"][1], rows["p99_ms"][1], rows["p50_ms"][0]) == (500, 600, None)
    assert (rows["rss_mb"][:3], rows["waiting"][:3]) == ([100, 200, None], [0, 4, None])
    assert found["queue"] == {"start": 0, "max": 4, "end": 0}
    assert found["offered"] == {"id": "m", "device": None, "dtype": None, "default_method": None}


# -- a scripted server -------------------------------------------------------------------------------------------------

Answer = Callable[[int, dict[str, Any]], Awaitable[tuple[int, bytes, str] | None]]


@contextmanager
def scripted(answer: Answer) -> Iterator[str]:
    """A server that says of every ``POST`` what ``answer`` does: status, body and headers; None: it hangs up."""
    loop, started, count = asyncio.new_event_loop(), Event(), iter(range(10**9))
    address: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError), closing(writer):
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
                body = await reader.readexactly(int(headers["content-length"]))
                given: tuple[int, bytes, str] | None = (200, b'{"data": [{"id": "scripted"}]}', "")
                if lines[0].startswith("POST"):
                    given = await answer(next(count), json.loads(body))
                if given is None:
                    return
                status, payload, more = given
                echo = f"x-request-id: {headers.get('x-request-id', '')}\r\n" if "x-request-id" not in more else ""
                length = "" if "transfer-encoding" in more else f"content-length: {len(payload)}\r\n"
                writer.write(f"HTTP/1.1 {status} x\r\n{echo}{length}{more}\r\n".encode() + payload)

    async def run() -> None:
        ended = asyncio.Event()
        end.append(lambda: loop.call_soon_threadsafe(ended.set))
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        address.append(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        started.set()
        await ended.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0)

    end: list[Callable[[], object]] = []
    thread = Thread(target=lambda: loop.run_until_complete(run()), daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield address[0]
    finally:
        end[0]()
        thread.join(10)
        loop.close()


def test_the_wait_of_those_that_arrive_while_the_server_stalls_is_counted() -> None:
    """One connection, 100 arrivals a second, and a server that stands still once, for half a second."""

    async def answer(number: int, _: dict[str, Any]) -> tuple[int, bytes, str]:
        await asyncio.sleep(0.5 if number == 40 else 0)
        return GOOD

    with scripted(answer) as url:
        found = record_of(drive(LoadSettings(server=url, rate=100, requests=140, max_connections=1)))
    assert found["counts"] == {"due": 140, "unfinished": 0, "ok": 140}
    due, sent = found["latency_ms"]["ok"], found["from_sending_ms"]["ok"]
    assert sent["max"] >= 500
    assert sent["p90"] < 100  # of the requests that were sent, one was slow
    # About 50 came during the stall, a third of all, and waited 250 ms in the mean.
    assert due["p90"] > 250
    assert due["mean"] > 3 * sent["mean"]
    assert not found["driver"]["kept_up"]


def test_each_outcome_is_counted_by_its_name() -> None:
    error = {"error": {"code": "queue_full", "message": "later", "request_id": "r"}}
    script: dict[int, tuple[int, bytes, str] | None] = {
        0: (503, json.dumps(error).encode(), "retry-after: 1\r\n"),
        1: (502, b"<html>bad gateway</html>", ""),
        2: (500, b'{"error": {"code": "NOT A CODE"}}', ""),
        3: None,
        4: (200, SOFT, "x-request-id: another\r\n"),
        5: (200, SOFT[:20], ""),
        6: (200, SOFT, "server-timing: queue;dur=1.000, tokenize;dur=0.5, run;dur=2.0\r\nconnection: close\r\n"),
        7: (
            200,
            b"%x\r\n%b\r\n%x;x=y\r\n%b\r\n0\r\n\r\n" % (9, SOFT[:9], len(SOFT) - 9, SOFT[9:]),
            "transfer-encoding: chunked\r\n",
        ),
        8: (200, b"x", "transfer-encoding: gzip\r\n"),
    }

    async def answer(number: int, _: dict[str, Any]) -> tuple[int, bytes, str] | None:
        return script.get(number, GOOD)

    with scripted(answer) as url:
        run = drive(LoadSettings(server=url, rate=200, requests=12, max_connections=1))
    assert [each.outcome for each in run.samples] == [
        *("queue_full", "http_502", "http_500", "connection_error", "wrong_answer", "wrong_answer"),
        *("ok", "ok", "connection_error", "ok", "ok", "ok"),
    ]
    assert run.samples[6].timing == {"queue": 0.001, "tokenize": 0.0005, "run": 0.002}
    assert {each.tokens for each in run.samples if each.outcome == "ok"} == {7}
    assert record_of(run)["lost"] == 4


def test_clients_wait_for_their_answers_and_pause_after_an_error() -> None:
    most = [0, 0]

    async def answer(number: int, _: dict[str, Any]) -> tuple[int, bytes, str]:
        most[0] += 1
        most[1] = max(most)
        await asyncio.sleep(0.02)
        most[0] -= 1
        return GOOD if number >= 3 else (503, b"", "retry-after: 0.2\r\n")

    with scripted(answer) as url:
        run = drive(LoadSettings(server=url, concurrency=3, requests=30))
    assert [each.outcome for each in run.samples] == ["http_503"] * 3 + ["ok"] * 27
    assert most[1] == 3
    assert run.samples[3].due_at - run.samples[0].due_at >= 0.22
    assert record_of(run)["settings"]["rate"] is None


# -- a real server -----------------------------------------------------------------------------------------------------


@contextmanager
def real_server(backend: FakeBackend, keys: Keys | None = None, **limits: Any) -> Iterator[str]:
    observer = PrometheusObserver(torch.device("cpu"))
    service = LocalService(CompressionEngine(backend, limits=EngineLimits(**limits), observer=observer))
    with running_server(create_app(service, observer=observer, keys=keys, page=False)) as url:
        yield url


def test_a_real_server_under_light_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, lines = new_key("driver")
    (tmp_path / "keys.toml").write_text(lines)
    out, picture, settings = tmp_path / "record.json", tmp_path / "run.png", ["--rate", "40", "--duration", "1.2"]
    with real_server(FakeBackend(seconds=0.005, together=False), Keys.load(tmp_path / "keys.toml")) as url:
        monkeypatch.setenv("CONDENSE_API_KEY", key)
        command = ["bench", "serve", "--server", url, *settings, "--repeat", "0.3"]
        assert main([*command, "-o", str(out), "--plot", str(picture)]) == 0
    found = json.loads(out.read_text())
    expected = sum(at <= 1.2 for at in islice(poisson_times(40, 0), 1000))
    assert found["counts"] == {"due": expected, "unfinished": 0, "ok": expected}
    assert found["cached"] > 0
    assert found["overhead_ms"]["count"] == expected - found["cached"]
    assert 5 <= found["stages_ms"]["run"]["p50"] < 50
    assert found["latency_ms"]["ok"]["p50"] >= found["stages_ms"]["run"]["p50"]
    assert found["memory"]["start_mb"] > 50
    assert found["offered"]["id"] == "fake"
    assert key not in out.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_refusals_of_a_real_server_at_overload() -> None:
    with real_server(FakeBackend(seconds=0.05, together=False), max_requests=2) as url:
        found = record_of(drive(LoadSettings(server=url, rate=80, requests=60, timeout=5)))
    assert found["counts"]["queue_full"] == found["refused"] > 20
    assert found["counts"]["ok"] + found["refused"] == 60
    assert found["refusal_ms"]["from_sending"]["p50"] < found["from_sending_ms"]["ok"]["p50"]
    assert (found["lost"], found["missed_deadline"]) == (0, 0)


def test_ctrl_c_shows_what_was_measured(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    code = "import sys; from condense_core.cli import main; sys.exit(main())"
    with real_server(FakeBackend(seconds=0.01)) as url:
        command = [sys.executable, "-c", code, "bench", "serve", "--server", url, "--concurrency", "2", "-o", str(out)]
        process = subprocess.Popen(
            [*command, "--duration", "60"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            env={**os.environ, "COLUMNS": "150"},
        )
        time.sleep(2.5)
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (130, b"")
    assert b"interrupted after" in printed
    found = json.loads(out.read_text())
    assert found["interrupted"]
    assert found["counts"]["ok"] > 5
    assert found["counts"]["unfinished"] <= 2
    assert 0 < found["seconds"] < 20


# -- what makes no sense -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--server", "127.0.0.1:8000"], "server: got '127.0.0.1:8000', expected a URL such as"),
        (["--server", "ftp://127.0.0.1"], "server: got 'ftp://127.0.0.1'"),
        (["--server", "http://127.0.0.1:99999"], "server: got 'http://127.0.0.1:99999'"),
        (["--server", "http://127.0.0.1:1"], "server: 127.0.0.1:1 cannot be reached (Connection refused), expected"),
        (["--rate", "2", "--concurrency", "2"], "concurrency: got a rate too"),
        (["--rate", "0"], "rate: got 0.0, expected a number above 0 and at most 10000"),
        (["--rate", "nan"], "rate: got nan"),
        (["--concurrency", "0"], "concurrency: got 0, expected an integer from 1 to 900"),
        (["--requests", "-1"], "requests: got -1"),
        (["--duration", "inf"], "duration: got inf"),
        (["--timeout", "0"], "timeout: got 0.0"),
        (["--repeat", "1"], "repeat: got 1.0, expected a share of at least 0 and below 1"),
        (["--method", "zip"], "method: got 'zip', expected one of"),
        (["--ratio", "0.5"], "ratio: got 0.5"),
        (["--mix", "no/such.jsonl"], "no/such.jsonl: No such file"),
        (["-o", "no/such/folder.json"], "output: no/such is not an existing folder"),
        (["--plot", "picture.bmp"], "plot: got 'picture.bmp'"),
    ],
)
def test_wrong_options_are_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {message}")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", 'line 2: expected a JSON object such as {"chars": 2000}'),
        ("{", "line 2: expected a JSON object"),
        ('{"chars": 10}', "line 2: chars: got 10, expected an integer from 50"),
        ('{"chars": true}', "line 2: chars: got True"),
        ('{"length": 100}', "line 2: unknown field 'length'"),
        ('{"chars": 100, "method": "zip"}', "line 2: method: got 'zip'"),
        ('{"chars": 100, "ratio": 0}', "line 2: ratio: got 0"),
        ('{"chars": 100, "weight": -1}', "line 2: weight: got -1"),
        ('{"chars": 100, "question": " "}', "line 2: question: got ' '"),
    ],
)
def test_a_mix_that_is_none_is_refused_by_its_line(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mix.jsonl"
    path.write_text('{"chars": 100}\n' + line)
    with pytest.raises(ValueError) as caught:
        RecordedMix.load(path)
    assert str(caught.value).startswith(f"mix: {path}, {message}")
    path.write_text('{"chars": 100, "weight": 0}')
    with pytest.raises(ValueError, match="expected at least one"):
        RecordedMix.load(path)


def test_a_server_of_something_else_and_a_wrong_key_are_told(tmp_path: Path) -> None:
    _, lines = new_key("somebody")
    (tmp_path / "keys.toml").write_text(lines)
    with real_server(FakeBackend(), Keys.load(tmp_path / "keys.toml")) as url:
        with pytest.raises(ValueError, match="does not know the key, expected one of its own in CONDENSE_API_KEY"):
            drive(LoadSettings(server=url), key="ck_wrong")
        with pytest.raises(ValueError, match="is no server of compression \\(status 404\\)"):
            drive(LoadSettings(server=url + "/elsewhere"), key="ck_wrong")
        with pytest.raises(ValueError, match="key: got characters"):
            drive(LoadSettings(server=url), key="a\r\nb: c")


def test_a_run_of_nothing_is_not_drawn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing was measured"):
        plot_load(record_of(Run(LoadSettings(), "salt", {})), tmp_path / "run.png")
