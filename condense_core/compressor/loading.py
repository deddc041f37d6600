"""Loading a model by name: errors of one line, its public name, its dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig


@contextmanager
def load_errors(name_or_path: str | Path) -> Iterator[None]:
    """Around the loading of a model: whatever goes wrong becomes a ``ValueError`` of one line that names the model."""
    path, name = Path(name_or_path), str(name_or_path)
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "~", "/"))
    if (path.exists() or not is_hub_id) and not (path / "config.json").is_file():
        raise ValueError(f"model: {name!r} is no model folder (no config.json in it); expected a folder or a hub id")
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise ValueError(f"model: cannot load {name!r} ({reason})") from error


def public_model_id(name_or_path: str) -> str:
    """A hub id as it is; of a local folder only its name, so that soft tokens do not carry paths of a machine."""
    if not name_or_path:  # a live model that was never loaded; Path("") would be the current folder
        return "unnamed"
    path = Path(name_or_path)
    return path.resolve().name if path.exists() else name_or_path


def checkpoint_dtype(name: str, revision: str | None) -> torch.dtype:
    dtype = AutoConfig.from_pretrained(name, revision=revision).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
