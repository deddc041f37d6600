"""What a training run is a run of: it is resumed with the same settings, or refused by the name of what differs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from condense_core.compressor.config import CompressorConfig
from condense_core.decoder.model import public_model_id
from condense_core.training.config import FREE, TrainConfig

Fingerprint = dict[str, Any]

#: Fields of a compressor's config that name its model; what the model is, ``model_state`` says.
_NAMES = ("model_id", "model_revision", "model_digest")


def compressor_fingerprint(config: CompressorConfig) -> Fingerprint:
    """Everything that decides the shape of a compressor's weights, or what they mean."""
    return {name: value for name, value in asdict(config).items() if name not in _NAMES}


def model_fingerprint(model: PreTrainedModel) -> Fingerprint:
    """The decoder: its name for the message, its class and the shapes of its weights."""
    shapes = json.dumps([(name, list(tensor.shape)) for name, tensor in model.state_dict().items()])
    return {
        "model": f"{public_model_id(model.name_or_path)} ({type(model).__name__}, {_digest(shapes)})",
    }


def training_fingerprint(config: TrainConfig) -> Fingerprint:
    """The settings of ``config`` that change what is learned."""
    return {name: value for name, value in asdict(config).items() if name not in FREE}


def check_same_run(folder: Path, run: Mapping[str, Any] | None, asked: Mapping[str, Any]) -> None:
    """Refuse to resume the run in ``folder`` with other settings than it was begun with.

    Args:
        folder: named in the message.
        run: the fingerprint that its state holds; None: it was written before there were any, and is not checked.
        asked: the fingerprint of what is to go on.

    Raises:
        ValueError: one or more settings differ.
    """
    if run is None:
        return
    wanted = json.loads(json.dumps(asked))  # tuples become lists, as in the state
    differing = [
        f"{name}: the run in {folder} has {_short(run.get(name))}, got {_short(wanted.get(name))}"
        for name in dict.fromkeys([*wanted, *run])
        if run.get(name) != wanted.get(name)
    ]
    if differing:
        raise ValueError(f"{'; '.join(differing)}; expected the same, or another folder")


def _short(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
