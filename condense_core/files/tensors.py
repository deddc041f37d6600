"""Tensors into safetensors files, with the errors of the operating system and the permissions of any other file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """``safetensors.torch.save_file``; where the file cannot be written, an OSError says so in one line.

    safetensors raises an exception of its own for a full disk, which no caller takes for bad input, and makes files
    that only their owner can read, whatever the umask says.

    Args:
        tensors: by name; contiguous, and none shares memory with another.
        path: of the file; what lies there is replaced when the new one is complete.
        metadata: of the header.

    Raises:
        OSError: the disk is full, or the folder is missing or closed; ``filename`` is ``path``.
    """
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        found = _OS_ERROR.search(str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
