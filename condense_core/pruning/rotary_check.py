"""Which rotary embedding each layer of a model has, found by what the layer makes of the same input at two positions.

Nothing is concluded from a model's name: the keys that the model itself caches decide between the forms that
``Rotary`` can describe. A model that turns its keys in another way is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from threading import get_ident
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from condense_core.decoder.architecture import check_depth, decoder_parts, hidden_behind, layer_kinds
from condense_core.decoder.checked import once_per_model
from condense_core.pruning.attention import SESSIONS
from condense_core.pruning.rotary import Rotary

NUM_TOKENS = 16
MAX_SHIFT = 8191
"""By how many positions keys are moved at most. A larger distance tells slower frequencies apart, and the rounding of
its angle in float32 is larger."""
TOLERANCE = 0.02
"""Largest relative difference of the model's own keys and the moved ones; 16-bit cos and sin alone make 0.004."""

SUPPORTED = (
    "rotary embeddings of fixed frequencies over the first channels of a head, paired as halves (Llama) or as "
    "neighbours (Cohere), and layers without one"
)


@once_per_model
def rotary_of(model: PreTrainedModel) -> tuple[Rotary, ...]:
    """The rotary embedding of every layer of ``model``.

    Runs 16 tokens through the model twice, in one batch, at positions 0 and ``shift``; every attention layer gets the
    same input for both. Its keys at ``shift`` must be those at 0 moved by ``shift``. Of a large model only the first
    layers run, and the others have what the first of their kind has.

    Raises:
        ValueError: a layer's keys move in no way that is known; the message names the layer and what is supported.
    """
    name, inner = type(model).__name__, decoder_parts(model)
    kinds = getattr(inner.rotary_emb, "rope_type", "default")
    for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
        if kind in ("dynamic", "longrope"):
            raise ValueError(
                f"model: the rotary embedding of {name} is of the kind {kind!r}, whose frequencies change with the "
                f"length of the text; supported: {SUPPORTED}"
            )
    shift = max(min(_num_positions(model) - NUM_TOKENS, MAX_SHIFT), 1)
    keys = _keys_at_two_positions(model, inner, shift)
    tables = _tables(inner.rotary_emb)
    found: list[Rotary] = []
    for index, (near, far) in enumerate(keys):
        errors = []
        for rotary in _candidates(near.shape[-1], tables, found[-1:]):
            moved = rotary.move(near, torch.tensor(shift, device=near.device))
            errors.append(float((moved - far).norm() / far.norm().clamp_min(1e-20)))
            if errors[-1] < TOLERANCE:
                found.append(rotary)
                break
        else:
            raise ValueError(
                f"model: keys of layer {index} of {name} do not move with their position in a known way (off by "
                f"{min(errors):.0%} at best); supported: {SUPPORTED}"
            )
    kinds = layer_kinds(model)
    return tuple(found[kinds.index(kind)] if index >= len(found) else found[index] for index, kind in enumerate(kinds))


def _num_positions(model: PreTrainedModel) -> int:
    return int(getattr(model.config, "max_position_embeddings", None) or 2048)


def _tables(embedding: Any) -> list[tuple[Tensor, float]]:
    """The frequencies ``[r/2]`` and factors that a model's rotary embedding holds, one pair for each layer type."""
    found = []
    for name, inv_freq in embedding.named_buffers(recurse=False):
        if name.endswith("inv_freq") and "original" not in name:
            factor = getattr(embedding, name.removesuffix("inv_freq") + "attention_scaling", 1.0)
            found.append((inv_freq.detach().float(), float(factor)))
    return found


def _candidates(head_dim: int, tables: list[tuple[Tensor, float]], before: list[Rotary]) -> Iterator[Rotary]:
    """What a layer may do, the likeliest first: what the layer ``before`` does."""
    yield from before
    for inv_freq, factor in tables:
        if 2 * len(inv_freq) <= head_dim and (head_dim - 2 * len(inv_freq)) % 2 == 0:
            yield Rotary(inv_freq, factor, head_dim)
            yield Rotary(inv_freq, factor, head_dim, interleaved=True)
            yield Rotary(-inv_freq, factor, head_dim)  # nanochat turns the other way
    yield Rotary(torch.zeros(0), 1.0, head_dim)


def _keys_at_two_positions(model: PreTrainedModel, inner: Any, shift: int) -> list[tuple[Tensor, Tensor]]:
    """Of each layer the keys ``[G, 16, D]`` float32 of the same 16 inputs at positions 0 and ``shift`` on."""
    vocabulary, device = inner.embed_tokens.weight.shape[0], inner.embed_tokens.weight.device
    row = torch.arange(NUM_TOKENS, device=device)
    ids = (row * 7919 + 11) % vocabulary
    cache = DynamicCache(config=model.config)

    def run() -> None:
        SESSIONS.set(())  # the model's own attention, whatever sessions are open here
        with torch.no_grad(), _same_input_in_both_rows([layer.self_attn for layer in inner.layers]):
            hidden_behind(
                model,
                check_depth(model),
                input_ids=ids.expand(2, -1),
                attention_mask=torch.ones(2, NUM_TOKENS, dtype=torch.long, device=device),
                position_ids=torch.stack([row, row + shift]),
                past_key_values=cache,
                use_cache=True,
            )

    copy_context().run(run)
    run_layers = cache.layers[: check_depth(model)]
    return [(layer.keys[0].float(), layer.keys[1].float()) for layer in run_layers]


@contextmanager
def _same_input_in_both_rows(modules: list[Any]) -> Iterator[None]:
    """Inside, what this thread gives the modules as the second sequence of a batch is replaced by the first.

    Their keys then differ by position alone, not by what rounding has made of earlier layers.
    """
    thread = get_ident()

    def unify(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if get_ident() != thread:
            return None
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        same = hidden[:1].expand_as(hidden)
        if "hidden_states" in kwargs:
            return args, kwargs | {"hidden_states": same}
        return (same, *args[1:]), kwargs

    hooks = [module.register_forward_pre_hook(unify, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
