"""Folders: replaced as a whole or not at all, and by one process at a time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from condense_core.files.folders import locked, remove_tree, replace_folder, restore_folder


def write(text: str) -> Callable[[Path], None]:
    def into(folder: Path) -> None:
        folder.mkdir()
        (folder / "weights").write_text(text)

    return into


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    replace_folder(folder, write("first"))
    replace_folder(folder, write("second"))
    assert (folder / "weights").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("cause", [OSError("no space left"), KeyboardInterrupt()], ids=["full disk", "interrupted"])
def test_a_folder_whose_successor_is_cut_off_stays_and_nothing_else_does(tmp_path: Path, cause: BaseException) -> None:
    folder = tmp_path / "checkpoint"
    replace_folder(folder, write("first"))

    def cut_off(new: Path) -> None:
        write("half")(new)
        raise cause

    with pytest.raises(type(cause)):
        replace_folder(folder, cut_off)
    assert (folder / "weights").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_process_killed_between_two_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoint"
    replace_folder(folder, write("first"))
    rename, renamed = Path.replace, []

    def killed(path: Path, target: Path) -> Path:
        if renamed:
            raise KeyboardInterrupt
        renamed.append(path)
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        replace_folder(folder, write("second"))
    monkeypatch.undo()
    assert not folder.exists()
    restore_folder(folder)
    assert (folder / "weights").read_text() == "first"


@pytest.mark.parametrize("kind", ["file", "link", "broken link"])
def test_what_is_no_folder_gives_way_and_what_a_link_points_to_stays(tmp_path: Path, kind: str) -> None:
    folder, elsewhere = tmp_path / "checkpoint", tmp_path / "elsewhere"
    if kind == "file":
        folder.write_text("a file")
    else:
        if kind == "link":
            write("mine")(elsewhere)
        folder.symlink_to(elsewhere)
    replace_folder(folder, write("first"))
    replace_folder(folder, write("second"))
    assert (folder / "weights").read_text() == "second"
    assert not folder.is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", *(["elsewhere"] if kind == "link" else [])}
    if kind == "link":
        assert (elsewhere / "weights").read_text() == "mine"


def test_removing_what_is_not_there_is_nothing(tmp_path: Path) -> None:
    remove_tree(tmp_path / "nothing")


def test_a_lock_makes_another_process_wait_and_ends_with_its_holder(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    program = (
        "import sys; from pathlib import Path; from condense_core.files.folders import locked\n"
        "with locked(Path(sys.argv[1]), lambda: print('waiting', flush=True)): print('inside', flush=True)"
    )
    with locked(lock):
        other = subprocess.Popen([sys.executable, "-c", program, str(lock)], stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None
        assert other.stdout.readline() == "waiting\n"
        assert other.poll() is None
    assert other.communicate(timeout=60)[0] == "inside\n"
    with locked(lock, lambda: pytest.fail("the holder has ended")):
        pass
