"""Chat templates on the command line: their arguments reach them, and a template that refuses is one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from condense_core import cli
from condense_core.cli.options import parse_template_args

SPEAKING = "{{ raise_exception('mood is ' ~ mood ~ ', ' ~ messages[0]['role']) }}"


@pytest.fixture
def refusing(tiny_model_path: Path, tmp_path: Path) -> Path:
    """Folder of a model whose chat template refuses every chat, and says with which arguments."""
    folder = tmp_path / "refusing"
    shutil.copytree(tiny_model_path, folder)
    (folder / "chat_template.jinja").write_text(SPEAKING)
    return folder


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The price of the violet engine is 42 crowns. " * 30)
    return path


def error_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("command", ["ask", "full", "prune"])
def test_a_template_that_refuses_is_one_line_with_the_arguments_it_got(
    command: str, refusing: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {
        "ask": ["ask", str(text_file), "Why?"],
        "full": ["ask", str(text_file), "Why?", "--full"],
        "prune": ["prune", str(text_file), "-o", str(tmp_path / "cache")],
    }[command]
    options = ["--model", str(refusing), "--template-arg", "mood=false"]
    line = error_line([*words, *options], capsys)
    assert "error: chat_template: it refuses a user's message: mood is False, user; expected one that" in line
    line = error_line([*words, *options, "--template-arg", "system_prompt=[1]"], capsys)
    assert "mood is False, system" in line


def test_a_cache_is_asked_with_the_template_s_arguments(
    tiny_model_path: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, cache = tmp_path / "model", tmp_path / "cache"
    shutil.copytree(tiny_model_path, folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}{{ tail | default('') }}")
    assert cli.main(["prune", str(text_file), "-o", str(cache), "--model", str(folder)]) == 0
    capsys.readouterr()
    ask = ["ask", "--cache", str(cache), "Why?", "--model", str(folder), "--json", "--max-new-tokens", "4"]
    assert cli.main(ask) == 0
    plain = json.loads(capsys.readouterr().out)["answer"]
    assert cli.main([*ask, "--template-arg", "tail= of the north archive and the violet engine"]) == 0
    assert json.loads(capsys.readouterr().out)["answer"] != plain


def test_values_are_json_or_text() -> None:
    given = ["a=false", "b=3", "c=plain text", 'd={"x": [1]}', "system_prompt=42", "e="]
    expected = {"a": False, "b": 3, "c": "plain text", "d": {"x": [1]}, "system_prompt": "42", "e": ""}
    assert parse_template_args(given) == expected
    assert parse_template_args(None) == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["thinking"], "--template-arg: got 'thinking', expected NAME=VALUE"),
        (["=1"], "--template-arg: got '=1', expected NAME=VALUE"),
        (["a=1", "a=2"], "--template-arg: got 'a' twice"),
    ],
)
def test_bad_arguments(given: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_template_args(given)
