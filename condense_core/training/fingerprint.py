"""What a training run is a run of: it is resumed with the same settings, or refused by the name of what differs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from condense_core.compressor.config import CompressorConfig
from condense_core.decoder.identity import model_digest, same_weights
from condense_core.decoder.model import public_model_id
from condense_core.training.config import FREE, TrainConfig

Fingerprint = dict[str, Any]

#: Fields of a compressor's config that name its model, which ``model_fingerprint`` does.
_NAMES = ("model_id", "model_revision", "model_digest")


def compressor_fingerprint(config: CompressorConfig) -> Fingerprint:
    """Everything that decides the shape of a compressor's weights, or what they mean."""
    return {name: value for name, value in asdict(config).items() if name not in _NAMES}


def model_fingerprint(model: PreTrainedModel) -> Fingerprint:
    """The decoder: its name, which only helps the message, and the digest of its weights, which decides."""
    return {"model": public_model_id(model.name_or_path), "model_digest": model_digest(model)}


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
    held = dict(run)
    differing = []
    if not same_model(held, wanted):
        digests = [f"{found.get('model')} ({str(found.get('model_digest'))[:12]})" for found in (held, wanted)]
        differing.append(f"model: the run in {folder} has {digests[0]}, got {digests[1]}")
    differing += [
        f"{name}: the run in {folder} has {_short(held.get(name))}, got {_short(wanted.get(name))}"
        for name in dict.fromkeys([*wanted, *held])
        if name not in _MODEL and held.get(name) != wanted.get(name)
    ]
    if differing:
        raise ValueError(f"{'; '.join(differing)}; expected the same, or another folder")


_MODEL = ("model", "model_digest")


def same_model(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two fingerprints are of the same weights; of the same name, where one has no digest of them."""
    digests = [str(found.get("model_digest") or "") for found in (first, second)]
    return same_weights(*digests) if all(digests) else first.get("model") == second.get("model")


def _short(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
