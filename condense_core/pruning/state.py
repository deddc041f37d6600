"""What a session knows of the forward pass that a thread is computing."""

from __future__ import annotations

from threading import local
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from condense_core.pruning.masks import PassMasks
from condense_core.pruning.pruner import Chunks, LayerCall, PassScores, Scored


class ThreadState(local):
    """One thread's forward pass; ``chunks`` and ``pass_scores`` outlive it, as they span several.

    Attributes:
        call: the attention layer that runs, from its hook to its attention function.
        cache: what the model was given, or None.
        fresh: whether that cache was empty before.
        positions: ``[B or 1, Q]`` of the tokens that the model was given, as far as it was told.
        masks: the pass's attention masks.
        memo: what a method computes once for all layers.
        scored: layers that were scored and are pruned when all have been.
        ids: ``[B, Q]`` of the tokens that the model was given, where they are known.
        given_ids: the same, before a pass whose caller knows them and gives embeddings.
        chunks: a prefill in several passes that is under way.
        pass_scores: a scoring pass that is under way.
    """

    def __init__(self) -> None:
        self.chunks: Chunks | None = None
        self.pass_scores: PassScores | None = None
        self.fresh = False
        self.given_ids: Tensor | None = None
        self.begin(None)

    def begin(self, cache: Cache | None) -> None:
        """Begin a forward pass with ``cache``."""
        self.call: LayerCall | None = None
        self.cache = cache
        self.positions: Tensor | None = None
        self.masks = PassMasks()
        self.memo: dict[Any, Any] = {}
        self.scored: list[Scored] = []
        self.ids: Tensor | None = None

    def end(self) -> None:
        """End a forward pass: let go of its tensors."""
        self.begin(None)
