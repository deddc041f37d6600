"""A decoder's first layers with random weights: as fast as trained ones, and nobody has to have them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from condense_core.decoder.architecture import decoder_parts
from condense_core.decoder.partial import fill_buffers, keep_first_layers

_BLOCK = 1_000_003  # random values that are repeated; a prime, so that no two rows of a matrix are equal
_STD = 0.02


def decoder_shape(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The whole decoder of ``config`` without values, on the meta device.

    Raises:
        ValueError: transformers has no decoder for it. TypeError: it is none that this project knows.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"model: cannot build a decoder of a {type(config).__name__} ({lines[0]})") from error
    decoder_parts(model)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def random_first_layers(config: Any, num_layers: int, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Embeddings and the first ``num_layers`` layers, created on ``device``; no output head.

    Matrices are normal with a standard deviation of 0.02, norms are 1 and biases 0. Errors as of ``decoder_shape``.
    """
    model = decoder_shape(config, dtype)
    fill_buffers(model)
    keep_first_layers(model, num_layers)
    block = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)).mul_(_STD).to(device, dtype)
    for name, parameter in list(model.named_parameters()):
        path, _, leaf = name.rpartition(".")
        values = torch.empty_like(parameter, device=device)
        _fill(values, block if values.dim() > 1 else None, 0.0 if leaf.endswith("bias") else 1.0)
        setattr(model.get_submodule(path), leaf, nn.Parameter(values, requires_grad=False))
    for name, buffer in list(model.named_buffers()):
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, buffer.to(device))
    return model


def _fill(values: Tensor, block: Tensor | None, constant: float) -> None:
    if block is None:
        values.fill_(constant)
        return
    for piece in values.view(-1).split(len(block)):
        piece.copy_(block[: len(piece)])
