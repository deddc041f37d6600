"""Scoring passes: the model is given tokens behind a finished context, and their queries score what it holds.

KVzip and QueryAware need them. One sequence at a time is scored, against layers that do not keep what a pass adds.
Nothing is evicted before all passes are done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from condense_core.pruning.base import LayerContext, ScoringPass
from condense_core.pruning.layers import ReadOnlyLayer, UniformLayer
from condense_core.pruning.padding import Padding
from condense_core.pruning.pruner import PassScores, Pruner, Scored
from condense_core.pruning.state import ThreadState


def prune_by_scoring_passes(
    pruner: Pruner, model: Any, state: ThreadState, cache: Cache, embeds: Tensor, padding: Padding | None
) -> None:
    """Score the context of every sequence in its method's scoring passes, then prune all layers of ``cache``.

    Args:
        pruner: of the session that is open on the model.
        model: its decoder without the head, which the session's hooks watch.
        state: the session's, which is told what pass is under way.
        cache: what a prefill of ``embeds`` left, nothing evicted.
        embeds: ``[B, N, d_model]``.
        padding: of the batch; None: there is none.
    """
    layers = [layer for layer in cache.layers if isinstance(layer, UniformLayer)]
    batch, num_held = embeds.shape[:2]
    starts, lengths = (padding.starts, padding.lengths) if padding else ((0,) * batch, (num_held,) * batch)
    keys, values = ([t for layer in layers if (t := getattr(layer, name)) is not None] for name in ("keys", "values"))
    scores = [torch.full(k.shape[:3], -torch.inf, device=k.device) for k in keys]
    contexts: dict[int, LayerContext] = {}
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        columns = slice(start, start + length)
        held = [(k[b : b + 1, :, columns], v[b : b + 1, :, columns]) for k, v in zip(keys, values, strict=True)]
        for scoring_pass in pruner.method.scoring_passes(length):
            state.pass_scores = PassScores(scoring_pass, length)
            try:
                read_behind(model, held, embeds[b : b + 1, columns], scoring_pass)
                contexts = state.pass_scores.contexts
                for index, found in state.pass_scores.scores.items():
                    target = scores[index][b, :, columns]
                    torch.maximum(target, found[0], out=target)
            finally:
                state.pass_scores = None
    finish_scored(pruner, cache, scores, contexts, lengths, padding)


@torch.no_grad()
def read_behind(model: Any, held: Sequence[tuple[Tensor, Tensor]], embeds: Tensor, scoring_pass: ScoringPass) -> None:
    """Let ``model``, a decoder without its head, read what a scoring pass appends to one context.

    Args:
        held: keys and values ``[1, G, N, D]`` of each layer, which stay as they are.
        embeds: ``[1, N, d_model]``, of the context.
    """
    context: list[Any] = [ReadOnlyLayer() for _ in held]
    length = embeds.shape[1]
    for layer, (k, v) in zip(context, held, strict=True):
        layer.hold(k, v, length)
    prompt = torch.tensor([scoring_pass.prompt_ids], dtype=torch.long, device=embeds.device)
    own = embeds[:, scoring_pass.start : scoring_pass.stop]
    appended = torch.cat([model.embed_tokens(prompt).to(embeds.dtype), own], 1)
    model(
        inputs_embeds=appended,
        position_ids=torch.arange(length, length + appended.shape[1], device=embeds.device).unsqueeze(0),
        past_key_values=Cache(layers=context),
        use_cache=True,
    )


def finish_scored(
    pruner: Pruner,
    cache: Cache,
    scores: Sequence[Tensor],
    contexts: Mapping[int, LayerContext],
    lengths: Sequence[int],
    padding: Padding | None,
) -> None:
    """Prune the layers of ``cache``, which hold whole contexts of ``lengths`` tokens, by what all passes have scored.

    Args:
        scores: of each layer, ``[B, G, N]``, the largest of all passes.
        contexts: of each layer, what the method was told in the last pass.
    """
    scored = []
    for index, layer in enumerate(cache.layers):
        budgets = pruner.budgets(index, lengths)
        if index not in contexts or (pruner.method.traits.bounded and all(map(int.__ge__, budgets, lengths))):
            continue
        assert isinstance(layer, UniformLayer)
        assert layer.keys is not None
        assert layer.values is not None
        bounds = None if padding is None else padding.bounds.to(layer.keys.device)
        ctx = replace(contexts[index], budgets=budgets, lengths=tuple(lengths), bounds=bounds, scoring_pass=None)
        scored.append(Scored(layer, layer.keys, layer.values, scores[index], ctx, False, None))
    pruner.finish(cache, scored, None, None)
