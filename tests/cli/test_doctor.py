"""What ``condense doctor`` finds and prints, also about things that are missing or broken."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from types import ModuleType

import numpy
import pytest
import torch
import transformers
from rich.console import Console

import condense_core
from condense_core import cli
from condense_core.cli import doctor
from condense_core.decoder import embedded
from condense_core.ops import registry
from condense_core.ops.backends import REGISTRY


def test_json_names_what_runs_here(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    versions = report["versions"]
    assert versions["condense_core"] == condense_core.__version__
    assert versions["python"] == platform.python_version()
    assert versions["torch"] == importlib.metadata.version("torch")
    assert versions["transformers"] == transformers.__version__
    assert versions["numpy"] == numpy.__version__
    assert set(versions) >= {"triton", "tokenizers", "safetensors"}
    assert report["platform"]["torch_threads"] == torch.get_num_threads()
    assert report["platform"]["cpu_count"] >= report["platform"]["usable_cpus"] >= 1
    assert {entry["device"] for entry in report["devices"]["found"]} >= {"cpu"}
    assert (report["devices"]["why_no_cuda"] is None) == torch.cuda.is_available()


def test_backends_are_the_registry_s():
    rows = [(row.op, row.backend, row.available, row.why_not) for row in REGISTRY.table()]
    assert [tuple(row.values()) for row in doctor.ops_backends()["backends"]] == rows


def test_table_says_why_a_backend_is_missing(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    for row in REGISTRY.table():
        assert row.op in out
        if row.why_not == registry.no_implementation(row.op, row.backend):
            assert "- not in this version" in out
        elif row.why_not:
            assert f"no {row.backend}: {row.why_not}" in " ".join(out.split())


def test_unknown_backend_is_reported_not_raised(monkeypatch, capsys):
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "abacus")
    assert cli.main(["doctor"]) == 0
    assert "CONDENSE_BACKEND='abacus'" in capsys.readouterr().out


def test_cuda_devices(monkeypatch):
    class Properties:
        name, major, minor, total_memory = "Some GPU", 9, 0, 80 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    report = doctor.devices()
    assert [entry["device"] for entry in report["found"]][:2] == ["cuda:0", "cuda:1"]
    assert report["found"][0]["capability"] == "9.0"
    assert (report["default"], report["why_no_cuda"]) == ("cuda", None)
    assert doctor._describe_device(report["found"][0]) == "Some GPU, compute capability 9.0, 80.0 GiB"


@pytest.mark.parametrize(
    ("cuda", "reason"), [(None, "built without CUDA"), ("13.0", "built for CUDA 13.0, but no usable NVIDIA device")]
)
def test_why_there_is_no_cuda(cuda, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert reason in doctor.devices()["why_no_cuda"]


def test_flash_attn_present(monkeypatch):
    module = ModuleType("flash_attn")
    module.__version__ = "9.9"
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    assert doctor.attention()["flash_attn"] == "9.9"


@pytest.mark.parametrize(
    ("error", "reason"),
    [(ModuleNotFoundError("x"), "not installed"), (OSError("undefined\nsymbol"), "undefined symbol")],
)
def test_flash_attn_missing_or_broken(error, reason, monkeypatch):
    def fail(_name):
        raise error

    monkeypatch.setattr(doctor.importlib, "import_module", fail)
    report = doctor.attention()
    assert report["flash_attn"] is None
    assert reason in report["why_no_flash_attn"]
    assert report["chosen"] == "sdpa"


def test_extras_come_from_the_package_s_metadata(monkeypatch):
    class Metadata:
        def get_all(self, _name):
            return ["train", "serve"]

    lines = ["torch>=2", 'pytest>=1; extra == "train"', 'no-such-package; extra == "train"', 'numpy; extra == "serve"']
    monkeypatch.setattr(importlib.metadata, "metadata", lambda _name: Metadata())
    monkeypatch.setattr(importlib.metadata, "requires", lambda _name: lines)
    table = doctor.extras()
    assert table == {
        "train": {"pytest": pytest.__version__, "no-such-package": None},
        "serve": {"numpy": numpy.__version__},
    }
    assert doctor._describe_extra(table["serve"]) == f"installed: numpy {numpy.__version__}"
    assert doctor._describe_extra(table["train"]) == f"missing: no-such-package; installed: pytest {pytest.__version__}"


def test_extras_without_metadata(monkeypatch):
    def not_installed(_name):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "metadata", not_installed)
    assert doctor.extras() == {}


def test_embedded_model_there_or_not(tmp_path, tiny_model_path, monkeypatch):
    monkeypatch.setattr(embedded, "_PACKAGE", tmp_path / "condense_core")
    report = doctor.embedded_model()
    assert report["path"] is None
    assert "make tiny" in report["why_not"]
    folder = tmp_path / "condense_core" / "_models" / "condense-tiny"
    folder.parent.mkdir(parents=True)
    folder.symlink_to(tiny_model_path)
    report = doctor.embedded_model()
    assert report["path"] == str(folder)
    assert report["compressors"] == ["pool"]
    assert report["bytes"] > 100_000


def test_public_models_are_here_or_the_command_is_named(small_public_model, tmp_path, monkeypatch):
    from condense_core.decoder.fetch import fetch_model

    folder = fetch_model("tiny-public")
    by_name = {row["name"]: row for row in doctor.public_models()}
    assert by_name["tiny-public"]["path"] == str(folder)
    assert by_name["smollm2-135m"]["path"] is None
    console = Console(record=True, width=200)
    doctor.render(doctor.examine(), console)
    shown = console.export_text()
    assert f"Public model tiny-public: {folder}, 0 MB" in shown
    assert "Public model smollm2-135m: is not here yet (condense models get smollm2-135m)" in shown
    monkeypatch.setenv("CONDENSE_HOME", "~nobody-of-that-name")
    assert {row["path"] for row in doctor.public_models()} == {None}


def test_the_extension_is_reported_or_its_absence_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    from condense_core.ops import native

    report = doctor.extension()
    if report["loaded"]:
        assert report["instruction_set"] in report["instruction_sets"]
        assert report["why_not"] is None
    monkeypatch.setattr(native, "missing", lambda: "built for another Python")
    assert doctor.extension()["why_not"] == "built for another Python"
    console = Console(record=True, width=200)
    doctor.render(doctor.examine(), console)
    assert "none: built for another Python" in console.export_text()
