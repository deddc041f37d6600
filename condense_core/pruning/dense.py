"""A context that is read once and pruned in many ways: for evaluations, which compare methods and shares.

Pruning a layer needs its queries, keys, values and input, and these are the same whatever the method. They are kept
here for all layers, which takes about three times the memory of the cache itself, and every method prunes copies of it.
What comes out is bit for bit what ``PrunedCache.prefill`` gives, since the same code prunes the same tensors.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from condense_core.pruning.base import LayerContext, Method, ScoringPass, Wrapper
from condense_core.pruning.cache import PrunedCache
from condense_core.pruning.cache_layers import mark_uneven
from condense_core.pruning.layers import UniformLayer
from condense_core.pruning.prefill_inputs import checked_inputs
from condense_core.pruning.pruner import LayerCall, PassScores, Pruner
from condense_core.pruning.scoring_passes import finish_scored, read_behind
from condense_core.pruning.session import Session, layer_rotaries
from condense_core.pruning.surprise import token_surprise

PASSES = 16
"""Scoring passes that are remembered: the questions about one context, or the parts in which KVzip repeats it."""


@dataclass(frozen=True)
class _Observed:
    """One layer's forward pass. k, v: of the tokens that it read, ``[1, G, Q, D]``."""

    call: LayerCall
    q: Tensor
    k: Tensor
    v: Tensor
    sliding_window: int | None


@dataclass(eq=False)
class _Store:
    """Scores that do not depend on a budget, with the seconds that they took, and what using them again has saved."""

    scores: dict[Any, tuple[Tensor, float]] = field(default_factory=dict)
    saved: float = 0.0


@dataclass(frozen=True, repr=False)
class _Remembering(Wrapper):
    """Scores with ``method``, whose scores do not depend on its budget, each layer once."""

    store: _Store
    key: Method

    def score(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        key = (self.key, ctx.layer_idx, ctx.scoring_pass)
        found = self.store.scores.get(key)
        if found is None:
            started = time.perf_counter()
            scores = self.method.score(layer, q, k, v, ctx)
            self.store.scores[key] = scores, time.perf_counter() - started
            return scores
        self.store.saved += found[1]
        return found[0]


class DensePrefill:
    """A context, read whole by ``model``, of which ``prune`` makes caches.

    >>> dense = DensePrefill(model, ids)
    >>> caches = {share: dense.prune(SnapKV(keep=share)) for share in (0.5, 0.25)}

    seconds: what the latest ``prune`` would have taken with the prefill before it, from the parts that it has shared.
    """

    def __init__(self, model: PreTrainedModel, input_ids: Tensor) -> None:
        """input_ids: ``[1, N]`` int64; ``ValueError`` for a batch, else as ``PrunedCache.prefill``."""
        started = time.perf_counter()
        embeds, _ = checked_inputs(model, input_ids, None, None)
        if len(embeds) != 1:
            raise ValueError(f"input_ids: {len(embeds)} sequences, expected one")
        self.model, self.input_ids, self._embeds = model, input_ids.to(embeds.device), embeds
        self._layers: list[_Observed] = []
        self._passes: OrderedDict[ScoringPass, tuple[list[_Observed], float]] = OrderedDict()
        self._store = _Store()
        self._surprise: tuple[Tensor, float] | None = None
        with torch.no_grad(), self._observed(self._layers) as session:
            cache = Cache(layers=[UniformLayer() for _ in session.attentions])
            hidden = session.prefill(cache, embeds, None, None)
        assert hidden is not None
        self._hidden = hidden
        self._read_seconds = time.perf_counter() - started
        self.seconds = self._read_seconds

    @property
    def num_tokens(self) -> int:
        """N."""
        return int(self.input_ids.shape[1])

    @torch.no_grad()
    def prune(self, method: Method) -> PrunedCache:
        """What ``PrunedCache.prefill(model, input_ids, method)`` gives."""
        started, self._store.saved = time.perf_counter(), 0.0
        pruner = Pruner(method, layer_rotaries(self.model, method), len(self._layers))
        remembering = replace(pruner, method=_remembering(method, self._store))
        layers = [UniformLayer() for _ in self._layers]
        for layer, seen in zip(layers, self._layers, strict=True):
            layer.hold(seen.k, seen.v, self.num_tokens)
        cache = Cache(layers=list(layers))
        if method.scoring_passes(1):
            self._prune_by_passes(remembering, cache)
        else:
            self._prune_layers(remembering, cache, layers)
        mark_uneven(cache)
        self.seconds = time.perf_counter() - started + self._store.saved + self._read_seconds
        return PrunedCache.of_prefill(self.model, pruner, cache, (self.num_tokens,))

    @torch.no_grad()
    def pass_scores(self, method: Method) -> list[Tensor]:
        """What a method with scoring passes scores the tokens of each layer, ``[G, N]``."""
        pruner = Pruner(method, layer_rotaries(self.model, method), len(self._layers))
        return [scores[0] for scores in self._scores_of_passes(pruner)[0]]

    @property
    def layer_inputs(self) -> list[Tensor]:
        """What each layer's attention was given, ``[N, d_model]``."""
        return [seen.call.hidden[0] for seen in self._layers]

    def _prune_layers(self, pruner: Pruner, cache: Cache, layers: Sequence[UniformLayer]) -> None:
        memo: dict[Any, Any] = {}
        scored = []
        for layer, seen in zip(layers, self._layers, strict=True):
            call = replace(seen.call, cache=cache, layer=layer, memo=memo)
            one = pruner.prefill(call, layer, seen.q, seen.k, seen.v, None, None, seen.sliding_window)
            scored += [] if one is None else [one]
        if scored:
            surprise = self._token_surprise() if pruner.method.traits.reads_surprise else None
            pruner.finish(cache, scored, None, surprise)

    def _prune_by_passes(self, pruner: Pruner, cache: Cache) -> None:
        scores, contexts = self._scores_of_passes(pruner)
        finish_scored(pruner, cache, scores, contexts, (self.num_tokens,), None)

    def _scores_of_passes(self, pruner: Pruner) -> tuple[list[Tensor], dict[int, LayerContext]]:
        scores = [torch.full(seen.k.shape[:3], -torch.inf, device=seen.k.device) for seen in self._layers]
        contexts: dict[int, LayerContext] = {}
        for scoring_pass in pruner.method.scoring_passes(self.num_tokens):
            found = PassScores(scoring_pass, self.num_tokens)
            memo: dict[Any, Any] = {}
            for own, seen in zip(self._layers, self._read_again(scoring_pass), strict=True):
                k, v = torch.cat([own.k, seen.k], 2), torch.cat([own.v, seen.v], 2)
                pruner.score_pass(replace(seen.call, memo=memo), found, seen.q, k, v)
            contexts = found.contexts
            for index, own_scores in found.scores.items():
                torch.maximum(scores[index], own_scores, out=scores[index])
        return scores, contexts

    def _read_again(self, scoring_pass: ScoringPass) -> list[_Observed]:
        """What the layers compute in a scoring pass, remembered for the next method that asks for it."""
        known = self._passes.pop(scoring_pass, None)
        if known is None:
            started = time.perf_counter()
            seen: list[_Observed] = []
            held = [(layer.k, layer.v) for layer in self._layers]
            with self._observed(seen) as session:
                read_behind(session.inner, held, self._embeds, scoring_pass)
            known = seen, time.perf_counter() - started
        else:
            self._store.saved += known[1]
        self._passes[scoring_pass] = known
        while len(self._passes) > PASSES:
            forgotten, _ = self._passes.popitem(last=False)
            for key in [key for key in self._store.scores if key[2] == forgotten]:
                del self._store.scores[key]
        return known[0]

    def _token_surprise(self) -> Tensor:
        if self._surprise is None:
            started = time.perf_counter()
            found = token_surprise(self.model, self._hidden, self.input_ids)
            self._surprise = found, time.perf_counter() - started
        else:
            self._store.saved += self._surprise[1]
        return self._surprise[0]

    def _observed(self, into: list[_Observed]) -> Session:
        """A session that prunes nothing and appends to ``into`` what every layer computes."""

        def observe(call: LayerCall, q: Tensor, k: Tensor, v: Tensor, sliding_window: int | None) -> None:
            new = slice(k.shape[2] - q.shape[2], None)
            into.append(_Observed(replace(call, cache=None, layer=None), q, k[:, :, new], v[:, :, new], sliding_window))

        return Session(self.model, None, observer=observe)


def _remembering(method: Method, store: _Store) -> Method:
    """``method``, whose innermost part looks its scores up where they do not depend on a budget."""
    if isinstance(method, Wrapper):
        return replace(method, method=_remembering(method.method, store))
    if not method.traits.any_budget:
        return method
    return _Remembering(method, store, replace(method, keep=1.0, budget=None))  # type: ignore[type-var]
