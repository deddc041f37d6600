"""The files in deploy/neurons/ name options, variables, routes and metrics that there are, and hold no coldkey."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("bittensor", reason="the extra `neurons` is not installed")
from prometheus_client import CollectorRegistry
from typer.main import get_command

from condense_core.neurons import gateway, miner, validator
from condense_core.neurons.routing.observer import GatewayObserver
from condense_core.neurons.validating.status import Figures
from condense_core.serving.prometheus import PrometheusObserver

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
NEURONS = DEPLOY / "neurons"
COMMANDS: dict[str, Any] = {
    "miner": get_command(miner.app),
    "validator": get_command(validator.app),
    "gateway": get_command(gateway.app),
}
OF_OTHERS = {"CONDENSE_API_KEY", "HF_HUB_OFFLINE", "OPTIONS"}
"""Variables that no option reads: of a miner's client, of the hub's library, of PM2's file and the unit."""
STOP_SECONDS = 30
"""That a miner and a gateway give what they have accepted; 5 more are the server's own."""


def options(kind: str) -> set[str]:
    return {name for parameter in COMMANDS[kind].params for name in (*parameter.opts, *parameter.secondary_opts)}


def variables(kind: str) -> set[str]:
    return {parameter.envvar for parameter in COMMANDS[kind].params if parameter.envvar}


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load((NEURONS / "compose.yaml").read_text())["services"]
    return found


@pytest.mark.parametrize("kind", COMMANDS)
def test_compose_starts_each_neuron_with_options_that_there_are(kind: str) -> None:
    service = services()[kind]
    assert service["entrypoint"] == [f"condense-{kind}"]
    assert {word for word in service["command"] if word.startswith("--")} <= options(kind)
    assert set(service["environment"]) <= variables(kind)
    assert service["profiles"] == [kind]
    assert service["env_file"] == [f"{kind}.env"]
    port = service["command"][service["command"].index("--port") + 1]
    assert f":{port}/health" in str(service["healthcheck"]["test"])
    assert service["ports"][0].endswith(f"{port}:{port}")
    assert int(service["stop_grace_period"].removesuffix("s")) > STOP_SECONDS + 5


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_container_can_write_its_state_alone_and_sees_one_hotkey(kind: str) -> None:
    service = services()[kind]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    binds = [volume for volume in service["volumes"] if isinstance(volume, dict)]
    assert all(bind["read_only"] and not bind["bind"]["create_host_path"] for bind in binds)
    own = service["environment"]
    target = f"{own['WALLET_PATH']}/{own['WALLET_NAME']}/hotkeys/{own['HOTKEY_NAME']}"
    assert {bind["source"]: bind["target"] for bind in binds}[f"./hotkeys/{kind}"] == target
    written = {
        place for volume in service["volumes"] if isinstance(volume, str) for place in [volume] if ":ro" not in volume
    }
    assert {volume.split(":")[1] for volume in written} <= {"/state", "/audits"}
    named = set(yaml.safe_load((NEURONS / "compose.yaml").read_text())["volumes"])
    assert {volume.split(":")[0] for volume in service["volumes"] if isinstance(volume, str)} <= named


def test_the_image_can_hold_the_neurons_and_their_state() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert "[${EXTRA}]" in text
    assert "ARG EXTRA=serve" in text
    assert re.search(r"install -d .*-o condense /state /audits", text)
    assert "--build-arg EXTRA=neurons" in (NEURONS / "compose.yaml").read_text()


def test_nothing_names_a_coldkey() -> None:
    for path in NEURONS.iterdir():
        assert "coldkey" not in path.read_text(), path


def test_each_variable_of_the_example_is_read() -> None:
    names = re.findall(r"^#?([A-Z][A-Z_]+)=", (NEURONS / ".env.example").read_text(), re.MULTILINE)
    assert len(names) == len(set(names))
    known = set().union(*map(variables, COMMANDS))
    assert set(names) - OF_OTHERS <= known
    assert {"NETUID", "SUBTENSOR_NETWORK", "WALLET_PATH", "WALLET_NAME", "HOTKEY_NAME"} <= set(names)
    for kind in COMMANDS:  # what all of them need, each of them reads
        assert {"NETUID", "SUBTENSOR_NETWORK", "WALLET_PATH", "WALLET_NAME", "HOTKEY_NAME"} <= variables(kind)
    assert known <= set(names), "an option reads a variable that .env.example does not name"


def ecosystem(folder: Path) -> list[dict[str, Any]]:
    node = shutil.which("node")
    assert node is not None
    program = "console.log(JSON.stringify(require(process.argv[1])))"
    told = subprocess.run(
        [node, "-e", program, str(folder / "ecosystem.config.js")],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    apps: list[dict[str, Any]] = json.loads(told.stdout)["apps"]
    return apps


def test_pm2_has_time_to_end_each_neuron() -> None:
    text = (NEURONS / "ecosystem.config.js").read_text()
    seconds = {kind: int(found) for kind, found in re.findall(r'neuron\("(\w+)", (\d+)\)', text)}
    assert set(seconds) == set(COMMANDS)
    assert min(seconds.values()) > STOP_SECONDS + 5
    assert "kill_timeout: 1000 * seconds" in text
    assert "max_restarts" in text


@pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed")
def test_pm2_reads_the_settings_beside_its_file(tmp_path: Path) -> None:
    shutil.copy(NEURONS / "ecosystem.config.js", tmp_path)
    example = (NEURONS / ".env.example").read_text().replace("NETUID=", "NETUID=47")
    (tmp_path / "miner.env").write_text(example + "OPTIONS=--threads 8 --device cpu\n")
    apps = {app["name"]: app for app in ecosystem(tmp_path)}
    assert set(apps) == {f"condense-{kind}" for kind in COMMANDS}
    one = apps["condense-miner"]
    assert one["env"] == {
        "NETUID": "47",
        "SUBTENSOR_NETWORK": "finney",
        "WALLET_PATH": "~/.bittensor/wallets",
        "WALLET_NAME": "default",
        "HOTKEY_NAME": "default",
        "OPTIONS": "--threads 8 --device cpu",
    }
    assert (one["args"], one["script"], one["interpreter"]) == ("--threads 8 --device cpu", "condense-miner", "none")
    assert apps["condense-validator"]["env"] == {}
    assert all(app["kill_timeout"] > 1000 * (STOP_SECONDS + 5) and app["max_restarts"] > 0 for app in apps.values())


def unit() -> configparser.ConfigParser:
    read = configparser.ConfigParser(strict=False, interpolation=None)
    read.optionxform = str
    read.read_string((NEURONS / "condense-neuron@.service").read_text())
    return read


def test_the_unit_starts_any_neuron_and_gives_it_time_to_end() -> None:
    service = unit()["Service"]
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", service["ExecStart"]))
    assert used
    assert all(used <= options(kind) for kind in COMMANDS)
    assert "/bin/condense-%i " in service["ExecStart"]
    assert service["EnvironmentFile"] == "/etc/condense/%i.env"
    assert int(service["TimeoutStopSec"]) > STOP_SECONDS + 5
    assert service["KillSignal"] == "SIGTERM"
    state = service["ExecStart"].split("--state ")[1].split()[0].removeprefix("/var/lib/")
    assert state in service["StateDirectory"].split()  # else ProtectSystem=strict keeps it from being written


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_finds_nothing_wrong_but_that_the_program_is_not_there(tmp_path: Path) -> None:
    shutil.copy(NEURONS / "condense-neuron@.service", tmp_path)
    said = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / "condense-neuron@miner.service")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    about = [line for line in (said.stdout + said.stderr).splitlines() if "condense-neuron" in line]
    assert all("condense-miner is not executable" in line for line in about), about


def exported(registry: CollectorRegistry) -> set[str]:
    """All names under which a registry's metrics are asked for."""
    families = {metric.name for metric in registry.collect()}
    return families | {f"{name}_{suffix}" for name in families for suffix in ("total", "bucket", "sum", "count")}


def test_the_dashboard_shows_metrics_that_there_are() -> None:
    registries = {
        "miner": PrometheusObserver(torch.device("cpu")).registry,
        "validator": Figures(lambda: None).registry,
        "gateway": GatewayObserver().registry,
    }
    dashboard = json.loads((NEURONS / "grafana.json").read_text())
    used = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\b(?:condense|process)_\w+", target["expr"])
    }
    assert used <= set().union(*map(exported, registries.values()))
    own = {metric.name for metric in registries["validator"].collect() if metric.name.startswith("condense_")}
    own |= {metric.name for metric in registries["gateway"].collect() if metric.name.startswith("condense_gateway")}
    assert own <= {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in used}


PAGES = {"miner.md": ["miner"], "validator.md": ["validator"], "operating.md": [*COMMANDS]}
OF_OTHER_PROGRAMS = {"--network", "--wallet", "--wallet-hotkey", "--netuid", "--upgrade", "--system", "--home-dir"} | {
    *("--now", "--only", "--build-arg", "--profile", "--help")
}
"""Of btcli, pip, useradd, systemctl, pm2 and docker, in what a page tells to type."""


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_options_and_metrics_that_there_are(page: str) -> None:
    text = (DEPLOY.parent / "docs" / page).read_text()
    known = set().union(*map(options, PAGES[page])) | OF_OTHER_PROGRAMS
    for kind in PAGES[page]:
        for command in getattr(COMMANDS[kind], "commands", {}).values():
            known |= {name for parameter in command.params for name in parameter.opts}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= known
    registries = (PrometheusObserver(torch.device("cpu")).registry, Figures(lambda: None).registry)
    there = set().union(*map(exported, registries))
    there |= {f"condense_device_memory_{what}_bytes" for what in ("allocated", "reserved")}  # where there is a GPU
    assert set(re.findall(r"\b(?:condense|process)_[a-z_]+[a-z]\b", text)) - {"condense_core"} <= there
