"""Files that come from strangers and files that must not be half-written: what every format of this project shares."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

# What people pass by mistake, by its first bytes. None of these can begin a file with a header within bounds.
_FOREIGN_FORMATS = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes, and is never unpickled"),
    (b"\x93NUMPY", "a numpy array"),
    (b"GGUF", "a GGUF file"),
    (b"{", "JSON text"),
)


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


def header_length(start: bytes, num_bytes: int, *, limit: int, expected: str) -> int:
    """Bytes of the JSON header of a safetensors file of ``num_bytes`` whose first bytes, nine at least, are ``start``.

    Raises:
        ValueError: this is no safetensors file, or one with a header above ``limit`` or beyond its own end.
    """
    if not num_bytes:
        raise ValueError(f"no bytes at all, expected {expected} in safetensors format")
    length = int.from_bytes(start[:8], "little")
    if num_bytes < 8 or length < 2 or length > limit or start[8:9] != b"{":
        for prefix, what in _FOREIGN_FORMATS:
            if start.startswith(prefix):
                raise ValueError(f"this is {what}; expected {expected} in safetensors")
        if len(start) > 1 and start[0] == 0x80 and start[1] <= 5:
            raise ValueError("this is a Python pickle, which is never loaded; expected safetensors")
        raise ValueError(f"no safetensors header of 2 to {limit:,} bytes at the start; expected {expected}")
    if length > num_bytes - 8:
        raise ValueError(f"truncated: {num_bytes:,} bytes, expected at least {length + 8:,} for the header alone")
    return length


def parse_header(header: bytes) -> Any:
    """A header's JSON; ``ValueError`` where it is none, or where two readers could see two different things in it."""
    try:
        return json.loads(header.decode("utf-8"), object_pairs_hook=_object_without_duplicates)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        raise ValueError("the safetensors header is not valid JSON: the file is damaged or of another format") from None


def canonical_json(content: Mapping[str, Any]) -> bytes:
    """One text for equal contents, for digests and for files that do not depend on the machine."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are unique."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result
