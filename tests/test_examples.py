"""The programs of examples/ run as their users run them, and print what they promise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from condense_core.tasks.demo import DEMO_FACTS

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

# What an example says of the embedded model, behind its first line.
RIGHT = [f"{fact.question} {fact.answer}" for fact in (*DEMO_FACTS[:3], DEMO_FACTS[0])]
ANSWERS = {"soft_tokens.py": RIGHT, "pruned_cache.py": RIGHT}


def run(name: str, folder: Path) -> list[str]:
    """The lines that an example prints, run in another folder."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_it_runs_from_any_folder(name: str, tmp_path: Path) -> None:
    first, *others = run(name, folder=tmp_path)
    assert first
    assert name not in ANSWERS or others == ANSWERS[name]
    assert list(tmp_path.iterdir()) == [], "an example without arguments leaves nothing behind"


def test_a_method_of_ones_own_is_as_good_as_built_in_ones(tmp_path: Path) -> None:
    """``new_method.py`` counts right answers from a quarter of a text: its method is no worse than chance."""
    right = {
        name: int(count) for name, _, count in (line.rpartition(": ") for line in run("new_method.py", tmp_path)[1:])
    }
    assert list(right) == ["value_norm", "chunkkv(value_norm)", "random", "expected_attention"]
    assert right["value_norm"] > right["random"]
