"""Resumable training state in safetensors and JSON: parameters, Adam moments, the step. Nothing is pickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from condense_core.files.tensors import save_tensors
from condense_core.training.finite import not_finite

_STATE = "state.safetensors"


def save_state(
    folder: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, meta: dict[str, Any]
) -> None:
    """Write ``folder/state.safetensors``: beside first, then renamed, so that a write cut off leaves the state before.

    Args:
        folder: of the run; it is made where there is none.
        modules: whose parameters and buffers are written, by name.
        optimizer: whose moments are written.
        meta: JSON-ready; what ``read_meta`` and ``load_state`` give back.

    Raises:
        ValueError: a tensor holds a NaN or an infinity; nothing is written then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for prefix, module in modules.items():
        tensors |= {f"{prefix}/{name}": t.detach().contiguous().clone() for name, t in module.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{key}": torch.as_tensor(value).clone() for key, value in state.items()}
    if name := not_finite(tensors.items()):
        raise ValueError(f"state: {name} is not finite; expected finite tensors, {folder / _STATE} is left as it was")
    part = folder / f"{_STATE}.part"
    save_tensors(tensors, part, {"meta": json.dumps(meta)})
    part.replace(folder / _STATE)


def read_meta(folder: Path) -> dict[str, Any] | None:
    """The ``meta`` of the state in ``folder``, without its tensors; None where there is no state.

    Raises:
        ValueError: the file is no training state.
    """
    path = folder / _STATE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            meta: dict[str, Any] = json.loads(file.metadata()["meta"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no training state ({' '.join(str(error).split())})") from error
    return meta


def load_state(
    folder: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer | None
) -> dict[str, Any] | None:
    """Restore what ``save_state`` wrote and return its ``meta``; None where there is nothing to resume.

    Args:
        folder: of the run.
        modules: whose parameters and buffers are set; others in the file are left out.
        optimizer: whose moments are set; None: of none.

    Raises:
        ValueError: the file is no training state, or its tensors do not fit the modules.
    """
    meta = read_meta(folder)
    if meta is None:
        return None
    path = folder / _STATE
    tensors = load_file(path)
    for prefix, module in modules.items():
        own = {k.removeprefix(f"{prefix}/"): v for k, v in tensors.items() if k.startswith(f"{prefix}/")}
        try:
            module.load_state_dict(own)
        except RuntimeError as error:
            raise ValueError(f"{path}: does not fit {prefix!r} ({' '.join(str(error).split())})") from error
    if optimizer is not None:
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer/"):
                _, index, key = name.split("/")
                state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return meta
