"""Whether a model computes in a session what it computes alone, found out on 16 tokens at its first use."""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import copy_context
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from condense_core.decoder.architecture import (
    check_depth,
    check_embeds,
    check_tolerance,
    evaluating,
    hidden_behind,
    relative_error,
    unsupported,
)
from condense_core.decoder.partial import check_whole
from condense_core.pruning.attention import BASES, PREFIX, SESSIONS
from condense_core.pruning.layers import UniformLayer
from condense_core.pruning.ragged import RaggedLayer

_KINDS = {"full_attention", "sliding_attention"}
_PREFILL = 11
"""Tokens that are read first; four follow at once and one alone."""


def check_session(model: PreTrainedModel, session: AbstractContextManager[Any]) -> None:
    """``TypeError`` unless ``model`` gives its own hidden states in ``session``, which prunes nothing.

    16 tokens are read in three passes, behind layers whose heads hold equally many tokens and behind ragged ones. So a
    model is refused whose attention module computes something else than one softmax over the keys that it caches
    (multi-head latent attention, differential attention, masks of its own), or whose arguments are not honoured.
    ``ValueError`` for a model that was loaded in part.
    """
    check_whole(model, "pruning")
    kinds = set(getattr(model.config, "layer_types", None) or ()) - _KINDS
    if kinds:
        raise unsupported(model, f"has layers of the kind {', '.join(sorted(kinds))}, a cache of which is not pruned")
    if str(model.config._attn_implementation).removeprefix(PREFIX) not in BASES:
        return  # refused when a session is opened
    with evaluating(model), torch.no_grad():
        copy_context().run(_compare, model, session)


def _compare(model: PreTrainedModel, session: AbstractContextManager[Any]) -> None:
    SESSIONS.set(())  # the model's own attention, whatever sessions are open here
    depth, embeds = check_depth(model), check_embeds(model)
    own = hidden_behind(model, depth, inputs_embeds=embeds, use_cache=False)[0]
    try:
        with session:
            cache = Cache(layers=[UniformLayer() for _ in range(depth)])
            uniform = _read(model, cache, embeds, 0)
            cache.crop(_PREFILL - embeds.shape[1])
            cache.layers[:] = [_as_ragged(layer) for layer in cache.layers]
            ragged = _read(model, cache, embeds, _PREFILL)
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise unsupported(model, f"has an attention that cannot be pruned ({reason})") from None
    for found, expected in ((uniform, own), (ragged, own[_PREFILL:])):
        distance = relative_error(found, expected)
        if distance > check_tolerance(embeds.dtype):
            raise unsupported(
                model,
                f"has an attention that a session does not reproduce (its hidden states are off by {distance:.2g})",
            )


def _read(model: PreTrainedModel, cache: Cache, embeds: Tensor, start: int) -> Tensor:
    """Hidden states ``[N - start, d]`` of the embeddings from ``start`` on, read behind ``cache`` by its layers."""
    edges = [edge for edge in (0, _PREFILL, embeds.shape[1] - 1, embeds.shape[1]) if edge >= start]
    found = [
        hidden_behind(
            model,
            len(cache.layers),
            inputs_embeds=embeds[:, first:last],
            position_ids=torch.arange(first, last, device=embeds.device).unsqueeze(0),
            past_key_values=cache,
            use_cache=True,
        )[0]
        for first, last in pairwise(edges)
    ]
    return torch.cat(found)


def _as_ragged(layer: Any) -> RaggedLayer:
    """A uniform layer of one sequence in the form of a ragged one."""
    heads, held = layer.keys.shape[1:3]
    device = layer.keys.device
    return RaggedLayer(
        layer.keys.flatten(0, 2),
        layer.values.flatten(0, 2),
        torch.arange(heads + 1, device=device, dtype=torch.int32) * held,
        batch=1,
        kv_heads=heads,
        positions=torch.arange(held, device=device).repeat(heads),
        seen=held,
    )
