"""The files in deploy/ name options, settings and metrics that there are."""

from __future__ import annotations

import configparser
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from typer.main import get_command

from condense_core.cli.app import app
from condense_core.serving.engine import EngineLimits
from condense_core.serving.prometheus import PrometheusObserver
from condense_core.serving.spec import EngineSpec

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
OPTIONS = {
    name
    for parameter in get_command(app).commands["serve"].params
    for name in parameter.opts  # type: ignore[attr-defined]
}


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))


def test_compose_names_options_that_there_are() -> None:
    [service] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"].values()
    assert {word for word in service["command"] if word.startswith("--")} <= OPTIONS
    stop = int(service["command"][service["command"].index("--stop-seconds") + 1])
    assert int(service["stop_grace_period"].removesuffix("s")) > stop + 5
    assert service["read_only"]
    assert "/health" in str(service["healthcheck"]["test"])


def test_the_image_starts_the_server() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert 'ENTRYPOINT ["condense", "serve"' in text
    assert options_in(text.split("ENTRYPOINT")[1]) <= OPTIONS
    assert re.search(r"^USER condense$", text, re.MULTILINE)


def test_the_unit_gives_the_server_time_to_end() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string((DEPLOY / "condense.service").read_text())
    start = unit["Service"]["ExecStart"]
    assert options_in(start) <= OPTIONS
    assert int(unit["Service"]["TimeoutStopSec"]) > int(start.split("--stop-seconds ")[1].split()[0]) + 5
    assert unit["Service"]["KillSignal"] == "SIGTERM"


def test_the_cluster_file_has_settings_that_there_are() -> None:
    pytest.importorskip("ray")
    from condense_core.serving.cluster.deployment import Scale, build

    text = (DEPLOY / "ray-serve.yaml").read_text()
    [application] = yaml.safe_load(text)["applications"]
    assert application["import_path"] == f"{build.__module__}:{build.__name__}"
    known = {field.name for kind in (EngineSpec, EngineLimits, Scale) for field in fields(kind)}
    assert set(application["args"]) <= known
    build(application["args"])
    assert options_in(text) <= OPTIONS
    with pytest.raises(ValueError, match="args: got 'replica'"):
        build({"replica": 2})


def test_the_dashboard_shows_metrics_that_there_are() -> None:
    observer = PrometheusObserver(torch.device("cpu"))
    known = {sample.name for metric in observer.registry.collect() for sample in metric.samples}
    families = {metric.name for metric in observer.registry.collect()}
    known |= {f"{name}_{suffix}" for name in families for suffix in ("total", "bucket", "sum", "count")} | families
    known |= {f"condense_device_memory_{what}_bytes" for what in ("allocated", "reserved")}  # where there is a GPU
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    used = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\b(?:condense|process)_\w+", target["expr"])
    }
    assert used <= known
    assert {name for name in families if name.startswith("condense_")} <= {
        re.sub(r"_(total|bucket|sum|count)$", "", name) for name in used
    }
