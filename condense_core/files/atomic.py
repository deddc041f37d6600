"""Files that must not be half-written, and errors that name them."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], what: str) -> Iterator[BinaryIO]:
    """A new file beside ``path`` to write into, which takes its place at the end; on failure nothing of it remains.

    A symbolic link keeps pointing where it did. what: named in errors, such as "soft tokens".

    Raises:
        OSError: the file cannot be written; the message names ``path``.
    """
    target = Path(os.path.realpath(path))
    # Not derived from the target's name, which may already be as long as the file system allows.
    beside = target.with_name(f".{uuid.uuid4().hex[:12]}.part")
    with naming(f"write {what} to", Path(path)):
        if target.exists() and not target.is_file():
            raise OSError(errno.EINVAL, "it exists and is not a regular file")
        try:
            with beside.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            beside.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            raise


def write_atomically(path: str | os.PathLike[str], data: bytes, what: str = "a file") -> None:
    """Write ``data`` to ``path``, as a whole or not at all; see ``replacing``."""
    with replacing(path, what) as file:
        file.write(data)


@contextlib.contextmanager
def naming(action: str, path: Path) -> Iterator[None]:
    """Turn an OSError about some intermediate file into one line about ``path``, of the same errno and class."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno or errno.EIO, f"cannot {action} {path}: {reason}") from error


def regular_size(path: Path) -> int:
    """Bytes of a file; ``OSError`` for a pipe or a device, reading which might never end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a regular file")
    return path.stat().st_size
