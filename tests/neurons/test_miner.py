"""``condense-miner`` as a process: it serves what was asked for, and says in one line what keeps it from doing so."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bittensor", reason="the extra `neurons` is not installed")
import httpx
from bittensor import http_auth

from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.decoder.embedded import embedded_model_path
from condense_core.neurons.protocol.messages import COMPRESS, Ask
from condense_core.neurons.protocol.signing import verify_response
from condense_core.neurons.tiers import DEFAULT_TIERS
from condense_testing import hosts
from condense_testing.chains import key
from condense_testing.hosts import Host, ran, refused, running, subnet_host

VALIDATOR = key("validator")
TEXT = "The keeper of the north archive counts the lamps at dusk. " * 30


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    folder, known = tmp_path_factory.mktemp("subnet"), {VALIDATOR.ss58_address: hosts.VALIDATOR, "h": {}}
    with subnet_host(folder, ["h", "unknown"], known) as made:
        yield made


def command(host: Host, *more: str, hotkey: str = "h", **options: Any) -> list[str]:
    given = {"external_ip": "127.0.0.1", "model": embedded_model_path(), "threads": 1, **options}
    return host.command("miner.py", hotkey, *more, **given)


def not_started(host: Host, *more: str, **options: Any) -> str:
    return refused(command(host, *more, **options))


def test_a_miner_serves_a_validator_and_ends_well(host: Host) -> None:
    with running(command(host), " serves ") as (process, url, said):
        assert f"{host.hotkeys['h']} serves inference_0, inference_1, research" in said[-1]
        assert "announced as 127.0.0.1:" in said[-1]
        body, nonce = Ask(tier="research", text=TEXT, ratio=4.0).to_bytes(), time.time_ns()
        signed = http_auth.sign(
            VALIDATOR, method="POST", path=COMPRESS, body=body, receiver_ss58=host.hotkeys["h"], nonce_ns=nonce
        )
        headers = {"content-type": "application/json", **signed}
        answer = httpx.post(url + COMPRESS, content=body, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        who = {"caller": VALIDATOR.ss58_address, "responder": host.hotkeys["h"]}
        verify_response(answer.headers, answer.content, nonce_ns=nonce, status=200, **who)
        assert SoftTokens.from_bytes(answer.content).model_id == "condense-tiny"
        assert httpx.get(f"{url}/ready").json() == {"status": "ready"}
        counted = httpx.get(f"{url}/metrics").text
        assert f'condense_http_responses_total{{route="{COMPRESS}",status="200"}} 1.0' in counted
        assert httpx.post(url + COMPRESS, content=body, headers=headers).status_code == 401  # a replay
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)
        assert process.stderr is not None
        logged = process.stderr.read()
        assert "Traceback" not in logged
        assert "lamps" not in logged


def test_a_dry_run_says_what_would_be_and_publishes_nothing(host: Host) -> None:
    ended = ran(command(host, "--dry-run"))
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert (told["hotkey"], told["uid"], told["validators"]) == (host.hotkeys["h"], 1, 1)
    assert {name: tier["soft_tokens"] > 100 for name, tier in told["tiers"].items()} == dict.fromkeys(
        ("inference_0", "inference_1", "research"), True
    )


def test_the_doctor_needs_no_chain_and_says_what_a_miner_would_earn(host: Host) -> None:
    miner, tiers = str(hosts.NEURONS / "miner.py"), str(host.tiers)
    options = ["--model", str(embedded_model_path()), "--tiers", tiers, "--tier", "inference_0", "--threads", "1"]
    ended = ran([sys.executable, miner, "doctor", *options, "--rounds", "2", "--json"], seconds=200)
    assert ended.returncode == 0, ended.stderr
    [told] = json.loads(ended.stdout)
    assert (told["tier"], told["model"], told["challenges"]) == ("inference_0", "condense-tiny", 2)
    assert [row["name"] for row in told["rows"]] == ["yours", "select", "mean"]
    assert told["rows"][0]["invalid"] == {}
    assert told["rows"][0]["recovered"] > 0.2
    misplaced = ran([sys.executable, miner, "--netuid", "7", "doctor"])
    assert misplaced.returncode == 2
    assert misplaced.stderr == "error: --netuid: stands before 'doctor', expected behind it\n"
    shown = ran([sys.executable, miner, "--help"]).stdout
    assert "doctor" in shown
    assert "--netuid" in shown


def test_what_keeps_it_from_serving_is_one_line(host: Host, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("version = 1")
    assert "netuid: got none, expected --netuid NUMBER" in not_started(host, netuid=None)
    assert "hotkey: 'none' of wallet 'w'" in not_started(host, hotkey="none")
    assert "has no uid on subnet 7, expected a registered one" in not_started(host, hotkey="unknown")
    assert "no chain at" in not_started(host, network=f"memory:{tmp_path / 'nowhere'}")
    assert "bad.toml: tiers: Field required" in not_started(host, tiers=tmp_path / "bad.toml")
    assert "external-ip: got 'here'" in not_started(host, external_ip="here")
    assert "expected one of them at most" in not_started(host, "--server", "http://127.0.0.1:1")
    assert "backend: 'json:Nothing' cannot be made" in not_started(host, "--backend", "json:Nothing", model=None)
    known = DEFAULT_TIERS
    assert "it serves no tier, expected the model mistralai/Mistral-7B-Instruct-v0.2" in not_started(host, tiers=known)


def test_a_clock_that_is_off_or_a_state_that_cannot_be_kept_ends_it_in_one_line(host: Host, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "state: nothing can be written in" in not_started(host, state=tmp_path / "file")
    # No file may grow, as on a full disk.
    full = ["bash", "-c", 'ulimit -f 0; exec "$@"', "bash", *command(host, state=tmp_path / "new")]
    ended = ran(full)
    assert ended.returncode == 2, ended.stderr
    assert re.fullmatch(r"error: state: nothing can be written in .* place left\n", ended.stderr)
    asyncio.run(host.control("set_time_offset", seconds=60))
    try:
        assert "clock: this host's is at least 60 s behind the chain's, expected at most 10 s" in not_started(host)
    finally:
        asyncio.run(host.control("set_time_offset", seconds=0))


def test_a_public_network_needs_an_address_that_is_reached(host: Host) -> None:
    assert "is not reached from elsewhere" in not_started(host, network="finney", external_ip="10.0.0.1")
