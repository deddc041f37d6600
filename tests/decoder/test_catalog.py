"""The table of public models: names that resolve, cached folders that are looked at, compressors that ship for them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from condense_core.decoder import catalog
from condense_core.decoder.catalog import CATALOG, MANIFEST_NAME, PublicModel, cache_home, cached_model, model_path
from condense_core.decoder.embedded import embedded_model_path

SMOL = CATALOG["smollm2-135m"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CONDENSE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def folder(home: Path) -> Path:
    """What a whole folder of the model looks like, without its weights."""
    folder = home / "models" / SMOL.name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    manifest = catalog.manifest_of(SMOL, {"config.json": 2, "model.safetensors": 7}, {"torch": "2"})
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("model", CATALOG.values(), ids=list(CATALOG))
def test_an_entry_is_complete_and_can_be_typed(model: PublicModel) -> None:
    assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*", model.name)
    assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in (model.wheel_sha256, model.member_sha256))
    assert min(model.wheel_bytes, model.member_bytes, model.parameters, model.positions) > 0
    assert all([model.version, model.license, model.credit, model.paper])
    assert CATALOG[model.name] is model


def test_a_name_is_the_folder_in_the_cache(folder: Path) -> None:
    assert model_path("smollm2-135m") == str(folder)
    assert cached_model(SMOL).problem is None
    assert cached_model(SMOL).num_bytes == sum(path.stat().st_size for path in folder.iterdir())


def test_the_embedded_model_has_a_name_too() -> None:
    assert model_path("condense-tiny") == str(embedded_model_path())


@pytest.mark.parametrize("given", ["someone/smollm2-135m", "./smollm2-135m", "models/x", "SmolLM2-135M", Path("a/b")])
def test_what_is_no_name_stays_as_it_is(given: str | Path) -> None:
    assert model_path(given) == str(given)


def test_a_folder_of_that_name_is_meant_by_a_path(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "smollm2-135m").mkdir()
    monkeypatch.chdir(tmp_path)
    assert model_path("smollm2-135m") == str(folder)
    assert model_path("./smollm2-135m") == "./smollm2-135m"
    assert model_path(Path("smollm2-135m")) == str(tmp_path / "smollm2-135m")
    # Loading goes through it more than once.
    assert model_path(model_path(Path("smollm2-135m"))) == str(tmp_path / "smollm2-135m")


def test_a_model_that_is_not_here_is_one_line_with_the_command(home: Path) -> None:
    with pytest.raises(ValueError) as caught:
        model_path("smollm2-135m")
    assert str(caught.value) == "model: 'smollm2-135m' is not here yet; run 'condense models get smollm2-135m' (93 MB)"


def other_release(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest | {"format": 99}))


def other_source(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest | {"gguf_sha256": "0" * 64}))


DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    ("another release", other_release, "was written by another release (format 99, expected 1)"),
    ("another source", other_source, "was made from another file (SHA-256 000000000000, expected b179c9523d0e)"),
    ("no manifest", lambda f: (f / MANIFEST_NAME).unlink(), f"is damaged (no readable {MANIFEST_NAME} in "),
    ("no JSON", lambda f: (f / MANIFEST_NAME).write_text("{"), f"is damaged (no readable {MANIFEST_NAME} in "),
    ("a list", lambda f: (f / MANIFEST_NAME).write_text("[1]"), f"is damaged (no readable {MANIFEST_NAME} in "),
    ("no text", lambda f: (f / MANIFEST_NAME).write_bytes(b"\xff"), f"is damaged (no readable {MANIFEST_NAME} in "),
    ("cut off", lambda f: (f / "model.safetensors").write_bytes(b"wei"), "model.safetensors has 3 bytes, expected 7)"),
    ("missing", lambda f: (f / "model.safetensors").unlink(), "model.safetensors has no bytes, expected 7)"),
]


@pytest.mark.parametrize(("damage", "message"), [row[1:] for row in DAMAGE], ids=[row[0] for row in DAMAGE])
def test_a_folder_that_is_not_whole_or_of_another_release_is_refused_with_the_remedy(
    folder: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(folder)
    with pytest.raises(ValueError) as caught:
        model_path("smollm2-135m")
    line = str(caught.value)
    assert message in line
    assert line.endswith("; run 'condense models get smollm2-135m' to make it again (93 MB)")
    assert "\n" not in line


def test_the_cache_lies_where_the_variable_says_or_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CONDENSE_HOME", "")
    assert cache_home() == tmp_path / ".cache" / "condense_core"
    monkeypatch.setenv("CONDENSE_HOME", "~/elsewhere")
    assert cache_home() == tmp_path / "elsewhere"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONDENSE_HOME", "here")
    assert cache_home() == tmp_path / "here"
    monkeypatch.setenv("CONDENSE_HOME", "~nobody-of-that-name/x")
    with pytest.raises(ValueError, match=r"CONDENSE_HOME: got '~nobody-of-that-name/x', and .*; expected a folder"):
        cache_home()


def test_looking_up_a_name_loads_nothing_heavy() -> None:
    code = (
        "import sys; from condense_core.decoder.catalog import model_path, cached_model, CATALOG; model_path('a/b'); "
        "[cached_model(m) for m in CATALOG.values()]; "
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
