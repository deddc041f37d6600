"""Which compressor a model gets: the checkpoint that belongs to it, or the configuration of an untrained one."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from condense_core.compressor.config import (
    COMPRESSION_METHODS,
    MEMORY_SEGMENT,
    TRAINED_METHODS,
    CompressorConfig,
)
from condense_core.decoder.architecture import decoder_parts
from condense_core.decoder.embedded import shipped_compressors
from condense_core.decoder.identity import mismatch, model_digest, same_weights
from condense_core.decoder.partial import UnloadedDecoder, whole_depth


def find_checkpoint(model: PreTrainedModel, method: str | None = None) -> Path | None:
    """Folder of the trained compressor that lies beside ``model`` or ships for it; None: there is none."""
    if method is not None and method not in COMPRESSION_METHODS:
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(COMPRESSION_METHODS)}")
    beside = Path(model.name_or_path) / "condense" / (method or "pool")
    if model.name_or_path and beside.is_dir():
        return beside
    # What ships for a public model belongs to its weights, wherever they lie and whatever they are called.
    mine = model_digest(model)
    shipped = ((path, CompressorConfig.load(path).model_digest) for path in shipped_compressors(method or "pool"))
    return next((path for path, digest in shipped if digest and mine and same_weights(digest, mine)), None)


def untrained(
    model: PreTrainedModel, method: str, encoder_layers: int | None, model_id: str, model_revision: str
) -> CompressorConfig:
    """The configuration of ``method`` without weights for ``model``; ``ValueError`` where that is of no use."""
    if method == "mixed":
        raise ValueError("method: 'mixed' is of use only trained; expected a compressor checkpoint of it")
    if encoder_layers is None:
        encoder_layers = -(-3 * whole_depth(model) // 5) if method == "select" else 0  # docs/design.md says why
    return CompressorConfig(
        method=method,
        d_model=decoder_parts(model).embed_tokens.weight.shape[1],
        encoder_layers=encoder_layers,
        num_heads=model.config.num_attention_heads if method == "pool" else 1,
        segment_tokens=MEMORY_SEGMENT if method == "memory" else 0,
        model_id=model_id,
        model_revision=model_revision,
    )


def choose(
    model: PreTrainedModel,
    method: str | None,
    compressor: str | Path | None,
    encoder_layers: int | None,
    model_id: str = "",
    model_revision: str = "",
) -> tuple[CompressorConfig, Path | None]:
    """What compressor ``model`` gets, and the folder of its checkpoint; None: it is untrained.

    Arguments as of ``Condenser``. ``ValueError`` where the checkpoint is none or another one than was asked for.
    """
    folder = Path(compressor) if compressor is not None else find_checkpoint(model, method)
    if folder is None:
        return untrained(model, method or "select", encoder_layers, model_id, model_revision), None
    config = CompressorConfig.load(folder)
    check_checkpoint(folder, config, method, encoder_layers)
    return config, folder


def open_encoder(
    name_or_path: str | Path,
    *,
    method: str | None = None,
    compressor: str | Path | None = None,
    encoder_layers: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As many of a decoder's first layers as its compressor reads with, and its tokenizer.

    ``ValueError`` as from ``choose`` and from ``decoder.partial.open_first_layers``.
    """
    unloaded = UnloadedDecoder(name_or_path, device=device, dtype=dtype, revision=revision)
    config, _ = choose(unloaded.model, method, compressor, encoder_layers)
    depth = whole_depth(unloaded.model)
    if config.encoder_layers > depth:
        raise ValueError(
            f"encoder_layers: got {config.encoder_layers}, expected 0 to {depth}, the layers of {unloaded.name!r}"
        )
    return unloaded.load(config.encoder_layers), unloaded.tokenizer()


def check_checkpoint(folder: Path, config: CompressorConfig, method: str | None, encoder_layers: int | None) -> None:
    """``ValueError`` where the checkpoint in ``folder`` is of another method or depth than was asked for."""
    if method is not None and config.method != method:
        raise ValueError(f"method: got {method!r}, the checkpoint {folder} is {config.method!r}")
    if encoder_layers is not None and encoder_layers != config.encoder_layers:
        trained = f"the checkpoint {folder} was trained with {config.encoder_layers}"
        raise ValueError(f"encoder_layers: got {encoder_layers}, {trained}")


def check_model(what: str, config: CompressorConfig, model: PreTrainedModel, model_id: str) -> None:
    """``ValueError`` where the compressor was trained for another model; ``select`` learns nothing of one."""
    if config.method not in TRAINED_METHODS or not (config.model_id or config.model_digest):
        return
    if not config.model_id and config.d_model != decoder_parts(model).embed_tokens.weight.shape[1]:
        return  # a width says more than a digest alone; the compressor compares it
    if reason := mismatch(config.model_id, config.model_digest, model_id, model_digest(model)):
        raise ValueError(f"compressor: {what} was {reason.replace('made by', 'trained for', 1)}")
