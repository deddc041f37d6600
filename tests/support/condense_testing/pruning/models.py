"""A decoder in loops, float64 and explicit positions: what a model must compute behind a pruned context.

It shares no code with transformers or this project. Also what tests ask of caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from condense_core.pruning.layers import UniformLayer
from condense_core.pruning.ragged import RaggedLayer

Places = list[list[list[int]]]
"""``[layer][head][place]``: numbers of the tokens that every head of every layer keeps, of one sequence."""


@dataclass(frozen=True)
class Context:
    """What a prefill of N tokens leaves: of each layer keys before RoPE and values ``[G, N, D]``; logits ``[N, V]``."""

    keys: list[Tensor]
    values: list[Tensor]
    logits: Tensor


class Reference:
    """``model``'s computation for one sequence. What it needs of a model are its weights and a few numbers."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self.model, self.eps = model, config.rms_norm_eps
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.theta = config.rope_parameters["rope_theta"]

    def prefill(self, ids: Tensor) -> Context:
        """The context ``ids [N]``, at the positions 0, 1, 2, ..."""
        keys, values, logits = self._run(ids, 0, None)
        return Context(keys, values, logits)

    def answer(
        self, context: Context, columns: Places, ids: Tensor, start: int, positions: Places | None = None
    ) -> Tensor:
        """Logits ``[Q, V]`` of ``ids [Q]`` at the positions from ``start`` on.

        They see themselves, causally, and of the context only ``columns``, whose keys stand at ``positions`` (None:
        where they were computed).
        """
        at = columns if positions is None else positions
        earlier = [
            [
                (self.turned(keys[g, columns[index][g]], at[index][g]), values[g, columns[index][g]])
                for g in range(self.kv_heads)
            ]
            for index, (keys, values) in enumerate(zip(context.keys, context.values, strict=True))
        ]
        return self._run(ids, start, earlier)[2]

    def turned(self, x: Tensor, positions: Sequence[int]) -> Tensor:
        """``x [n, D]`` turned to ``positions [n]``: as complex numbers, of which RoPE pairs the halves."""
        frequency = self.theta ** (-torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim)
        angle = torch.tensor(list(positions), dtype=torch.float64)[:, None] * frequency
        low, high = x.chunk(2, -1)
        turned = torch.complex(low, high) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag], -1)

    def _run(self, ids: Tensor, start: int, earlier: Any) -> tuple[list[Tensor], list[Tensor], Tensor]:
        inner, count = self.model.model, len(ids)
        positions = range(start, start + count)
        causal = torch.ones(count, count, dtype=torch.bool).tril()
        hidden = inner.embed_tokens.weight.detach().double()[ids]
        all_keys, all_values = [], []
        for index, layer in enumerate(inner.layers):
            attention, x = layer.self_attn, self._norm(hidden, layer.input_layernorm)
            q, k, v = (
                self._linear(x, getattr(attention, name)).unflatten(-1, (-1, self.head_dim)).transpose(0, 1)
                for name in ("q_proj", "k_proj", "v_proj")
            )
            if hasattr(attention, "q_norm"):  # Qwen3
                q, k = self._norm(q, attention.q_norm), self._norm(k, attention.k_norm)
            all_keys.append(k)
            all_values.append(v)
            out = []
            for h in range(self.heads):
                g = h * self.kv_heads // self.heads
                keys, values, seen = self.turned(k[g], positions), v[g], causal
                if earlier is not None:
                    kept_keys, kept_values = earlier[index][g]
                    keys, values = torch.cat([kept_keys, keys]), torch.cat([kept_values, values])
                    seen = torch.cat([torch.ones(count, len(kept_keys), dtype=torch.bool), causal], 1)
                logits = self.turned(q[h], positions) @ keys.T / self.head_dim**0.5
                out.append(logits.masked_fill(~seen, -torch.inf).softmax(-1) @ values)
            hidden = hidden + self._linear(torch.cat(out, -1), attention.o_proj)
            x, mlp = self._norm(hidden, layer.post_attention_layernorm), layer.mlp
            gate = self._linear(x, mlp.gate_proj)
            hidden = hidden + self._linear(gate * gate.sigmoid() * self._linear(x, mlp.up_proj), mlp.down_proj)
        return all_keys, all_values, self._linear(self._norm(hidden, inner.norm), self.model.lm_head)

    def _norm(self, x: Tensor, module: nn.Module) -> Tensor:
        weight: Tensor = module.weight  # type: ignore[assignment]
        return weight.detach().double() * x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()

    @staticmethod
    def _linear(x: Tensor, module: nn.Linear) -> Tensor:
        out = x @ module.weight.detach().double().T
        return out if module.bias is None else out + module.bias.detach().double()


def kept(cache: Any, sequence: int, num_tokens: int) -> Places:
    """Which of its ``num_tokens`` tokens a cache holds of a sequence right after the prefill."""
    places: Places = []
    for layer in cache.layers:
        if isinstance(layer, RaggedLayer):
            edges, heads = (
                layer.kept_offsets.tolist(),
                range(sequence * layer.kv_heads, (sequence + 1) * layer.kv_heads),
            )
            places.append([layer.positions[edges[n] : edges[n + 1]].tolist() for n in heads])
        else:
            assert isinstance(layer, UniformLayer)
            assert layer.keys is not None
            everything = [list(range(num_tokens))] * layer.keys.shape[1]
            places.append(everything if layer.positions is None else layer.positions[sequence].tolist())
    return places


def rows(layer: Any, sequence: int, head: int) -> tuple[Tensor, Tensor]:
    """Keys and values ``[n, D]`` that a head holds."""
    if isinstance(layer, RaggedLayer):
        n = sequence * layer.kv_heads + head
        start = int(layer.cu_seqlens[n])
        place = slice(start, start + int(layer.lengths[n]))
        return layer.keys[place], layer.values[place]
    return layer.keys[sequence, head], layer.values[sequence, head]


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """``actual`` within ``tolerance`` of ``expected``, relative to its largest magnitude."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max() / expected.abs().max()
    assert error < tolerance, f"error {error:.2e}"


def padded(ids: Tensor, lengths: Sequence[int], side: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A padded batch, its mask, and its sequences alone.

    The last (side "left") or first ``lengths[b]`` tokens of each row of ``ids [B, N]`` are real; id 1 is padding.
    """
    num_tokens = ids.shape[1]
    column = torch.arange(num_tokens)
    length = torch.tensor(list(lengths))[:, None]
    mask = (column >= num_tokens - length) if side == "left" else column < length
    return ids.where(mask, 1), mask.long(), [row[real] for row, real in zip(ids, mask, strict=True)]
