"""Scoring passes: the model is given tokens behind a finished context, and their queries score what it holds.

KVzip and QueryAware need them. One sequence at a time is scored, against layers that do not keep what a pass adds.
Nothing is evicted before all passes are done.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from condense_core.pruning.base import LayerContext
from condense_core.pruning.layers import ReadOnlyLayer, UniformLayer
from condense_core.pruning.padding import Padding
from condense_core.pruning.pruner import PassScores, Pruner
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
        context: list[Any] = [ReadOnlyLayer() for _ in layers]
        for layer, k, v in zip(context, keys, values, strict=True):
            layer.hold(k[b : b + 1, :, columns], v[b : b + 1, :, columns], length)
        for scoring_pass in pruner.method.scoring_passes(length):
            prompt = torch.tensor([scoring_pass.prompt_ids], dtype=torch.long, device=embeds.device)
            own = embeds[b : b + 1, start + scoring_pass.start : start + scoring_pass.stop]
            appended = torch.cat([model.embed_tokens(prompt).to(embeds.dtype), own], 1)
            last = length + appended.shape[1]
            state.pass_scores = PassScores(scoring_pass, length)
            try:
                model(
                    inputs_embeds=appended,
                    position_ids=torch.arange(length, last, device=embeds.device).unsqueeze(0),
                    past_key_values=Cache(layers=context),
                    use_cache=True,
                )
                contexts = state.pass_scores.contexts
                for index, found in state.pass_scores.scores.items():
                    target = scores[index][b, :, columns]
                    torch.maximum(target, found[0], out=target)
            finally:
                state.pass_scores = None
    for index, (k, v) in enumerate(zip(keys, values, strict=True)):
        budgets = pruner.budgets(index, lengths)
        if index not in contexts or (pruner.method.traits.bounded and all(map(int.__ge__, budgets, lengths))):
            continue
        bounds = None if padding is None else padding.bounds.to(k.device)
        ctx = replace(contexts[index], budgets=budgets, lengths=tuple(lengths), bounds=bounds, scoring_pass=None)
        pruner.apply(cache, layers[index], k, v, scores[index], ctx)
