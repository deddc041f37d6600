"""The judge of a model that a command line names."""

from __future__ import annotations

from pathlib import Path

import torch

from condense_core.compressor.condenser import Condenser
from condense_core.decoder.model import model_path, placement, weight_bytes
from condense_core.neurons.judging.judge import Judge
from condense_core.profiling.machine import free_memory

_BESIDE = 1.1  # of the weights: what reading answers takes beside them, at least


def open_judge(model: str | Path, *, device: str | None = None, dtype: str | None = None) -> Judge:
    """The judge of a whole model, which is loaded.

    Args:
        model: a folder, a hub id, or a name of ``condense models list``.
        device, dtype: as of ``open_decoder``, the dtype by its name.

    Raises:
        ValueError: the model cannot be loaded, or this machine has too little memory for it.
    """
    name = model_path(model)
    where, kind = placement(name, device, None if dtype is None else getattr(torch, dtype), None)
    needed, free = _BESIDE * weight_bytes(name, kind), free_memory(where)
    if free is not None and needed > free:
        raise ValueError(
            f"model: {str(model)!r} needs {needed / 1e9:.1f} GB as a whole in {str(kind).removeprefix('torch.')}, and "
            f"{where} has {free / 1e9:.1f} GB free; expected a machine with more, or another --device or --dtype"
        )
    # Every model can select; the compressor of a judge's condenser is not used.
    return Judge(Condenser.from_pretrained(model, method="select", device=device, dtype=kind))
