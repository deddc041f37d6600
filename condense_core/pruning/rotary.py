"""Rotary position embedding, as far as pruning needs it: angles of any position, and keys moved to another one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from condense_core.decoder.model import decoder_parts


@dataclass(frozen=True)
class Rotary:
    """RoPE in the half-split form (rotate_half) of Llama-shaped models. Su et al., arXiv 2104.09864.

    inv_freq: ``[D/2]`` float32, radians a position. factor: what the model multiplies cos and sin by (YaRN), else 1.
    """

    inv_freq: Tensor
    factor: float = 1.0

    @staticmethod
    def of(model: PreTrainedModel) -> Rotary:
        """The rotary embedding of ``model``; ``ValueError`` where it does not turn whole heads in one fixed way."""
        embedding = decoder_parts(model).rotary_emb
        inv_freq = getattr(embedding, "inv_freq", None)
        config = model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if not isinstance(inv_freq, Tensor) or inv_freq.numel() * 2 != head_dim:
            raise ValueError(
                f"model: {type(model).__name__} has no rotary embedding over whole heads of {head_dim}; expected a "
                "Llama-shaped decoder such as Mistral, Llama, Qwen2 or Qwen3"
            )
        kind = getattr(embedding, "rope_type", "default")
        if kind in ("dynamic", "longrope"):
            raise ValueError(
                f"model: its rotary embedding is of the kind {kind!r}, whose frequencies change with the length of the "
                "text; expected one of fixed frequencies"
            )
        return Rotary(inv_freq.detach().float(), float(getattr(embedding, "attention_scaling", 1.0)))

    def table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of integer ``positions [...]``: two ``[..., D/2]`` float32, without ``factor``."""
        angles = positions.unsqueeze(-1).float() * self.inv_freq.to(positions.device)
        return angles.cos(), angles.sin()

    def move(self, keys: Tensor, distance: Tensor) -> Tensor:
        """Keys ``[..., D]`` moved by ``distance [...]`` positions (negative: backwards), in float32 inside."""
        cos, sin = self.table(distance)
        low, high = keys.float().chunk(2, dim=-1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(keys.dtype)
