"""Folders that must not be half-written, and one process at a time in them."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Have ``write`` fill a new folder beside ``folder``, which takes its place when it is complete.

    At any moment the earlier content lies in ``folder``, or in ``folder.old`` if the process is killed between two
    renames; ``restore_folder`` undoes that. Where ``write`` fails, nothing of the new folder remains. Two processes
    must not replace one folder at the same time (``locked``).
    """
    new, old = folder.with_name(f"{folder.name}.new"), folder.with_name(f"{folder.name}.old")
    restore_folder(folder)
    remove_tree(new)
    try:
        write(new)
        _to_disk(new)
    except BaseException:
        remove_tree(new)
        raise
    if folder.exists() or folder.is_symlink():
        folder.replace(old)
    new.replace(folder)
    remove_tree(old)


def restore_folder(folder: Path) -> None:
    """Finish or undo what a killed ``replace_folder`` began."""
    old = folder.with_name(f"{folder.name}.old")
    if old.exists() and not folder.exists():
        old.replace(folder)
    remove_tree(old)


def remove_tree(path: Path) -> None:
    """Remove a folder, or whatever has its name, as far as possible; of a symbolic link only the link."""
    if path.is_symlink() or not path.is_dir():
        with contextlib.suppress(OSError):
            path.unlink()
        return
    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Only one process at a time is in the body, among those that name the same ``path``.

    The lock ends with the process that holds it, however that ends. Where the system or the file system has no locks,
    nobody waits.

    Args:
        path: a file that is made where there is none, and left there: were it removed, two processes could hold locks
            of two files of one name.
        waiting: called once before this process waits for another.
    """
    with path.open("ab") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting is not None:
                    waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                pass  # a network file system without locks
        yield


def _to_disk(folder: Path) -> None:
    """Have the files of ``folder`` on the disk before their folder is renamed: a power cut must not leave it empty."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                with contextlib.suppress(OSError):  # some file systems have no such thing
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
