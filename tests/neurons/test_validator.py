"""``condense-validator`` as a process: it plays rounds with a real miner, is killed, goes on, and sets weights."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bittensor", reason="the extra `neurons` is not installed")
import httpx

from condense_core.decoder.embedded import embedded_model_path
from condense_core.neurons.chain.opened import open_chain
from condense_core.neurons.incentive.standing import Standings
from condense_core.neurons.validating.ledger import Ledger
from condense_core.neurons.validator import main
from condense_testing import hosts
from condense_testing.chains import NETUID
from condense_testing.hosts import Host, ran, running, subnet_host


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    folder, settings = tmp_path_factory.mktemp("subnet"), ("tempo=20", "weights_rate_limit=5")
    known = {"v": hosts.VALIDATOR, "m": {}}
    with subnet_host(folder, ["v", "m", "unknown"], known, block_time=0.1, settings=settings) as made:
        made.tiers.write_text(made.tiers.read_text().replace("max_chars = 2500", "max_chars = 1200"))
        yield made


def command(host: Host, *more: str, hotkey: str = "v", **options: Any) -> list[str]:
    return host.command("validator.py", hotkey, *more, **{"threads": 1, **options})


def state(host: Host) -> Path:
    """Where the validator's ledger lies."""
    return host.folder / "v" / host.hotkeys["v"]


def count(host: Host) -> int:
    try:
        ledger = Ledger(state(host), writes=False)
    except ValueError:
        return 0
    try:
        return ledger.newest() or 0
    finally:
        ledger.close()


def test_it_plays_rounds_survives_a_kill_and_sets_weights(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    miner = host.command("miner.py", "m", external_ip="127.0.0.1", model=embedded_model_path(), threads=1)
    with running(miner):
        with running(command(host, every=0)) as (process, url, _):
            until = time.monotonic() + 60
            while count(host) < 2 and time.monotonic() < until:
                time.sleep(0.1)
            shown = httpx.get(f"{url}/leaderboard.json", timeout=10).json()
            assert shown["tiers"][0]["miners"][0]["hotkey"] == host.hotkeys["m"]
            assert httpx.get(f"{url}/ready").status_code == 200
            assert 'condense_rounds_total{counts="' in httpx.get(f"{url}/metrics").text
            assert httpx.get(f"{url}/nothing").json()["error"]["code"] == "not_found"
            process.send_signal(signal.SIGKILL)
            process.wait(10)
        before = count(host)
        assert before >= 2
        with running(command(host, every=0, rounds=2)) as (process, _, _):
            assert process.wait(60) == 0
            assert process.stderr is not None
            assert "Traceback" not in process.stderr.read()
        ledger = Ledger(state(host), writes=False)
        numbers = [number for (number,) in ledger.rows("SELECT number FROM rounds ORDER BY number")]
        assert numbers == list(range(1, len(numbers) + 1))
        assert len(numbers) >= before + 2
        expected = Standings()
        for number in numbers:
            played = ledger.round(number)
            assert [outcome.hotkey for outcome in played.outcomes] == [host.hotkeys["m"]]
            expected.add(played.tier, played.values)
        assert ledger.standings == expected
        assert ledger.standings.value("research", host.hotkeys["m"]) > 0
        ledger.close()

        async def incentive() -> float:
            chain = open_chain(host.network, NETUID, max_age=0.0)
            paid, until = 0.0, time.monotonic() + 20
            while not paid and time.monotonic() < until:  # the chain pays when an epoch ends
                paid = (await chain.metagraph()).by_hotkey[host.hotkeys["m"]].incentive
                await asyncio.sleep(0.2)
            await chain.close()
            return paid

        assert asyncio.run(incentive()) == 1.0

        tried = ran(command(host, "--dry-run"))
        assert tried.returncode == 0, tried.stderr
        told = json.loads(tried.stdout)
        assert (told["uid"], told["permit"], told["tiers"]["research"]["miners"]) == (0, True, 1)
        assert count(host) == len(numbers)  # nothing of it was written down

    assert main(["replay", "--state", str(state(host)), "--tiers", str(host.tiers), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["round"] == len(numbers)
    assert all(miner["agrees"] for miner in again["miners"])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("{")]  # without the log
    assert len(lines) == 1, lines
    return lines[0]


def test_what_keeps_it_from_judging_is_one_line(host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.toml").write_text("version = 1")
    (tmp_path / "file").write_text("")

    def told(*more: str, **changes: Any) -> str:
        return refused(capsys, *command(host, *more, **{"state": tmp_path / "v", **changes})[2:])

    assert "netuid: got none" in told(netuid=None)
    assert "hotkey: 'none' of wallet 'w'" in told(hotkey="none")
    assert "has no uid on subnet 7, expected a registered one" in told(hotkey="unknown")
    assert "no chain at" in told(network=f"memory:{tmp_path / 'nowhere'}")
    assert "bad.toml: tiers: Field required" in told(tiers=tmp_path / "bad.toml")
    assert "corpus: nowhere does not exist" in told(corpus="nowhere")
    assert "squad: nowhere is not a file" in told(squad="nowhere")
    assert "model: 'other' is of no tier, expected one of condense-tiny" in told(model="other")
    assert "state: " in told(state=tmp_path / "file")
    assert "holds no validator.db" in refused(capsys, "replay", "--state", str(tmp_path))
