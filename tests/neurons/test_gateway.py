"""``condense-gateway`` as a process, with a chain and a miner that are processes too, and the clients as they are."""

from __future__ import annotations

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

from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.neurons import gateway
from condense_core.neurons.judging.audits import AuditSpool
from condense_core.serving.client import CondenseClient
from condense_core.serving.errors import InvalidRequest, RateLimited, Unauthorized
from condense_testing import hosts
from condense_testing.hosts import Host, ran, refused, running, subnet_host

MODEL = "condense-tiny"
TEXTS = [f"The keeper of the {place} archive counts the lamps at dusk. " * 30 for place in ("north", "south", "east")]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    folder, known = tmp_path_factory.mktemp("subnet"), {"gateway": hosts.VALIDATOR, "miner": {}, "poor": {}}
    with subnet_host(folder, ["gateway", "miner", "unknown", "poor"], known) as made:
        yield made


@pytest.fixture(scope="module")
def api_key(host: Host) -> str:
    """A key, of which the file of keys knows the hash."""
    made = ran([sys.executable, str(hosts.NEURONS / "gateway.py"), "--new-key", "app"])
    key, _, lines = made.stdout.partition("\n\n")
    (host.folder / "keys.toml").write_text(lines + "chars_per_day = 20000\n")
    return key


def command(host: Host, *more: str, hotkey: str = "gateway", **options: Any) -> list[str]:
    return host.command("gateway.py", hotkey, *more, **options)


@pytest.fixture(scope="module")
def miner(host: Host) -> Iterator[str]:
    """A miner that has announced itself."""
    miner = host.command("miner.py", "miner", external_ip="127.0.0.1", model=MODEL, threads=1)
    with running(miner, " serves ") as (_, url, _):
        for _ in range(100):
            if httpx.get(f"{url}/ready").status_code == 200:
                break
            time.sleep(0.1)
        time.sleep(0.5)  # its address is announced once it serves
        yield url


def test_the_client_works_against_it_and_what_was_used_is_written_down(host: Host, miner: str, api_key: str) -> None:
    audits = host.folder / "audits"
    started = command(host, keys=host.folder / "keys.toml", audits=audits, audit_share=1.0, every=1)
    with running(started, "routes research by 1, inference_0 by 1, inference_1 by 1 miners") as (process, url, _):
        with pytest.raises(Unauthorized):
            CondenseClient(url, api_key="ck_wrong").compress(TEXTS[0])
        with CondenseClient(url, api_key=api_key, timeout=60) as client:
            soft = client.compress(TEXTS[0], ratio=4)
            assert soft.model_id == MODEL
            assert len(soft) == -(-soft.num_context_tokens // 4)
            many = client.compress_many(TEXTS, ratio=8, routing="k_of_n", k=2, tier="research")
            assert [each.context_sha256 == soft.context_sha256 for each in many] == [True, False, False]
            chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXTS[1]}]
            compressed = client.compress_messages(chat)
            assert compressed[0] == chat[0]
            assert isinstance(compressed[1]["content"], SoftTokens)
            with pytest.raises(InvalidRequest, match="expected what fits a tier: research 1,000 to 2,500"):
                client.compress("short")
            with pytest.raises(RateLimited, match="of its 20,000 characters of"):
                client.compress_many(TEXTS * 3, timeout=2)
            [model] = client.models()
            assert model["tiers"]["research"]["miners"] == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)
        assert process.stderr is not None
        logged = process.stderr.read()
        assert "Traceback" not in logged
        assert "lamps" not in logged
        assert api_key not in logged
    used = ran([sys.executable, str(hosts.NEURONS / "gateway.py"), "usage", "--state", str(host.folder / "gateway")])
    assert re.search(r"app\D+6\D+5\D", used.stdout), used.stdout  # requests, and those that were answered
    told = ran([*used.args, "--json"])
    [row] = json.loads(told.stdout)
    assert (row["key"], row["requests"], row["answered"]) == ("app", 6, 5)
    assert not any(b"lamps" in file.read_bytes() for file in (host.folder / "gateway").iterdir())
    taken = AuditSpool(audits).take(99)
    assert {audit.hotkey for audit in taken} == {host.hotkeys["miner"]}
    assert len(taken) == 5


def test_quotas_outlive_a_restart(host: Host, miner: str, api_key: str) -> None:
    keys = host.folder / "few.toml"
    keys.write_text((host.folder / "keys.toml").read_text().replace("20000", "4000"))
    started = command(host, keys=keys, state=host.folder / "few")
    for n in range(2):
        with running(started, "routes") as (process, url, _), CondenseClient(url, api_key=api_key) as client:
            if n == 0:
                client.compress_many(TEXTS[:2])
            else:
                with pytest.raises(RateLimited, match=r"has sent 3,\d+ of its 4,000"):
                    client.compress(TEXTS[0], timeout=2)
            process.send_signal(signal.SIGINT)
            process.wait(30)


def test_a_dry_run_says_what_would_be_and_serves_nothing(host: Host, miner: str) -> None:
    ended = ran(command(host, "--dry-run"))
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert (told["hotkey"], told["uid"], told["permit"]) == (host.hotkeys["gateway"], 0, True)
    assert {name: (tier["miners"], tier["miner"]) for name, tier in told["tiers"].items()} == dict.fromkeys(
        ("research", "inference_0", "inference_1"), (1, host.hotkeys["miner"])
    )


def test_a_hotkey_without_a_permit_is_warned_about_and_finds_out(host: Host, miner: str) -> None:
    ended = ran(command(host, "--dry-run", hotkey="poor"))
    assert ended.returncode == 0, ended.stderr
    assert "has no validator permit: most miners refuse it" in ended.stderr
    told = json.loads(ended.stdout)
    assert told["tiers"]["research"]["error"] == (
        "none of 1 miners of 'research' gave a valid answer (1 refused with 403)"
    )


def test_what_the_chain_says_against_it_is_one_line(host: Host, tmp_path: Path) -> None:
    assert "has no uid on subnet 7, expected a registered one" in refused(command(host, hotkey="unknown"))
    assert "no chain at" in refused(command(host, network=f"memory:{tmp_path / 'nowhere'}"))


def test_options_that_make_no_sense_are_one_line(
    host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(**options: Any) -> str:
        assert gateway.main(command(host, **options)[2:]) == 2
        [line] = capsys.readouterr().err.splitlines()
        return line

    (tmp_path / "bad.toml").write_text("version = 1")
    (tmp_path / "keys.toml").write_text("key = 1")
    assert "hotkey: 'none' of wallet 'w'" in refused(hotkey="none")
    assert "bad.toml: tiers: Field required" in refused(tiers=tmp_path / "bad.toml")
    assert "keys.toml holds no [[key]] tables" in refused(keys=tmp_path / "keys.toml")
    assert "netuid: got none" in refused(netuid=None)
    assert "routing: got 'worst', expected best, fastest or k_of_n" in refused(routing="worst")
    assert "model: 'other' is of no tier, expected one of condense-tiny" in refused(model="other")
    assert "state: " in refused(state=host.tiers)
    assert "audits: " in refused(audits=host.tiers)
    assert "--tls-key: got no --tls-cert" in refused(tls_key="x")
    assert gateway.main(["usage", "--state", str(tmp_path)]) == 2
    assert "state: no file" in capsys.readouterr().err
