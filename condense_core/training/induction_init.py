"""Weights that can already copy: a structured start for a small Mistral-architecture LM.

A randomly initialised transformer needs tens of millions of tokens before the circuit that looks something up in the
context ("induction heads", Olsson et al. 2022, arXiv 2209.11895) appears, and then it appears suddenly. A model of a
few million parameters trained on two CPU cores does not have these tokens to spend. Here the circuit is written into
the initial weights, in the spirit of mimetic initialisation (Trockman & Kolter 2023, arXiv 2305.09828), and training
refines it. Nothing about the architecture changes.

The residual stream is divided into blocks (nothing keeps them apart once training starts):

    content   the token's identity: random embedding, last dimension constant
    prev1/2   identity of the token one and two places back     written by layer 0, sharp positional heads
    near/far  average identity of the last ~4 and ~14 tokens    written by layer 0, broad positional heads
    out       what the output head reads                        written by the matching heads of the later layers

A positional head needs no position embedding: a constant query and key under RoPE score ``sum_f A_f cos(f (distance -
offset))``, which peaks at the offset. A matching head compares ``content`` of the query with ``prev1`` of the keys
(induction) or ``near``/``far`` of both (same surroundings) on the low rotary frequencies, which distance hardly turns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

_OFFSET_SCORE = 5.0  # score per rotary frequency of a sharp positional head, in nats
_BAG_SCORE = 2.0
_MATCH_GAIN = 1.7


def _blocks(d: int) -> dict[str, slice]:
    """Split ``d`` (a multiple of 12) into the blocks of the module's docstring."""
    unit = d // 12
    names = (("content", 4), ("prev1", 1), ("prev2", 1), ("near", 2), ("far", 2), ("out", 2))
    blocks, start = {}, 0
    for name, units in names:
        blocks[name] = slice(start, start + units * unit)
        start += units * unit
    return blocks


@torch.no_grad()
def induction_init(model: PreTrainedModel, *, seed: int = 0) -> None:
    """Overwrite the weights of a ``MistralForCausalLM`` with untied embeddings, in place.

    Needs a hidden size divisible by 12, at least 4 query heads and 2 KV heads (the first four query heads over the
    first two KV heads are structured, the rest start random).
    """
    config = model.config
    d, heads, groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    head_dim = config.head_dim
    if d % 12 or heads != 2 * groups or groups < 2 or head_dim < d // 6 or config.tie_word_embeddings:
        raise ValueError(
            f"model: got hidden size {d}, {heads} query and {groups} KV heads of width {head_dim}, tied embeddings "
            f"{config.tie_word_embeddings}; expected a multiple of 12, two query heads per KV head, at least two KV "
            "heads, heads of at least a sixth of the hidden size, and untied embeddings"
        )
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        else:
            parameter.fill_(1.0)
    at = _blocks(d)
    unit = d // 12
    bias = at["content"].stop - 1
    embed: Tensor = model.get_input_embeddings().weight
    identity = torch.randn(embed.shape[0], 4 * unit, generator=generator) * 0.5
    embed[:, at["content"]] = identity
    embed[:, bias] = 1.0
    # The value of the constant dimension behind the first RMSNorm.
    constant = 1.0 / math.sqrt((4 * unit * 0.25 + 1.0) / d)

    rope = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, head_dim, 2) / head_dim)
    half = head_dim // 2
    low = _low_frequency_dims(half)

    layers = model.model.layers
    for layer in layers:
        layer.self_attn.o_proj.weight.mul_(0.5)
        layer.mlp.down_proj.weight.mul_(0.5)

    first = layers[0].self_attn
    first.q_proj.weight[: 4 * head_dim].mul_(0.1)
    first.k_proj.weight[: 2 * head_dim].mul_(0.1)
    positional = (  # query head, distance of the peak, rotary frequencies used, score per frequency
        (0, 1.0, rope > 0.04, _OFFSET_SCORE),
        (1, 2.0, rope > 0.04, _OFFSET_SCORE),
        (2, 2.0, (rope < 0.6) & (rope > 0.06), _BAG_SCORE),
        (3, 6.0, (rope < 0.2) & (rope > 0.02), _BAG_SCORE),
    )
    for group in (0, 1):
        rows = slice(group * head_dim, (group + 1) * head_dim)
        key = torch.zeros(head_dim)
        key[:half] = 1.0
        first.k_proj.weight[rows, bias] = key
        first.v_proj.weight[rows].zero_()
        picked = at["content"].start + (0 if group == 0 else 2 * unit)
        for i in range(2 * unit):
            first.v_proj.weight[group * head_dim + i, picked + i] = 0.3
    for head, offset, used, score in positional:
        amplitude = used.float() * score * math.sqrt(head_dim) / constant**2
        query = torch.cat([amplitude * torch.cos(offset * rope), -amplitude * torch.sin(offset * rope)])
        first.q_proj.weight[head * head_dim : (head + 1) * head_dim, bias] = query
    for head, block, width in (
        (0, "prev1", unit),
        (1, "prev2", unit),
        (2, "near", 2 * unit),
        (3, "far", 2 * unit),
    ):
        gain = 1.0 if width == unit else 2.5  # an average over many tokens is shorter than one token
        for i in range(width):
            first.o_proj.weight[at[block].start + i, head * head_dim + i] = gain

    for layer in layers[1:]:
        attention = layer.self_attn
        _match(attention.q_proj.weight[0:head_dim], at["content"].start, unit, low, _MATCH_GAIN)
        _match(attention.q_proj.weight[head_dim : 2 * head_dim], at["prev1"].start, unit, low, _MATCH_GAIN)
        _match(attention.k_proj.weight[0:head_dim], at["prev1"].start, unit, low, 0.7 * _MATCH_GAIN)
        # The second head of group 0 asks for the bigram: what followed my predecessor's successor.
        _match(attention.k_proj.weight[0:head_dim], at["prev2"].start, unit, low, 0.3 * _MATCH_GAIN)
        for head, block in ((2, "near"), (3, "far")):
            rows = attention.q_proj.weight[head * head_dim : (head + 1) * head_dim]
            _match(rows, at[block].start, unit, low, _MATCH_GAIN)
        rows = attention.k_proj.weight[head_dim : 2 * head_dim]
        _match(rows, at["near"].start, unit, low, 0.7 * _MATCH_GAIN)
        _match(rows, at["far"].start, unit, low, 0.7 * _MATCH_GAIN)
        for group in (0, 1):
            for i in range(2 * unit):
                attention.v_proj.weight[group * head_dim + i, at["content"].start + i] = 0.3
        for head in range(4):
            for i in range(2 * unit):
                attention.o_proj.weight[at["out"].start + i, head * head_dim + i] = 0.5

    output: Tensor = model.get_output_embeddings().weight
    output[:, at["out"]] = identity[:, : 2 * unit] * 0.3


def _low_frequency_dims(half: int) -> list[int]:
    """Dimensions of a head that RoPE turns least, slowest first, both members of each rotary pair."""
    return [dim for k in reversed(range(half)) for dim in (k, k + half)]


def _match(rows: Tensor, start: int, width: int, dims: list[int], gain: float) -> None:
    """Let ``rows`` of a query or key projection read ``width`` residual dimensions into slow rotary dimensions."""
    for i in range(width):
        rows[dims[i], start + i] += gain
