"""Resumable training state in safetensors and JSON: parameters, Adam moments, the step. Nothing is pickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def save_state(
    folder: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, meta: dict[str, Any]
) -> None:
    """Write ``state.safetensors`` beside, then rename: a run cut off while writing resumes from the state before."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for prefix, module in modules.items():
        tensors |= {f"{prefix}/{name}": t.detach().contiguous().clone() for name, t in module.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{key}": torch.as_tensor(value).clone() for key, value in state.items()}
    save_file(tensors, folder / "state.safetensors.part", metadata={"meta": json.dumps(meta)})
    (folder / "state.safetensors.part").replace(folder / "state.safetensors")


def load_state(
    folder: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer | None
) -> dict[str, Any] | None:
    """Restore what ``save_state`` wrote and return its ``meta``; ``None`` where there is nothing to resume."""
    path = folder / "state.safetensors"
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        meta: dict[str, Any] = json.loads(file.metadata()["meta"])
    tensors = load_file(path)
    for prefix, module in modules.items():
        own = {k.removeprefix(f"{prefix}/"): v for k, v in tensors.items() if k.startswith(f"{prefix}/")}
        module.load_state_dict(own)
    if optimizer is not None:
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer/"):
                _, index, key = name.split("/")
                state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return meta
