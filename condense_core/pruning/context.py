"""What a method may know of the layer that it prunes.

Shapes as in ``base``: B sequences, H query heads, G key-value heads, D head_dim, N columns, Q queries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from condense_core.pruning.rotary import Rotary


@dataclass(frozen=True)
class ScoringPass:
    """Tokens that the model is given behind the finished context; their queries score it, then they are dropped.

    prompt_ids, then the context's own tokens ``start`` to ``stop``.
    """

    prompt_ids: tuple[int, ...] = ()
    start: int = 0
    stop: int = 0


@dataclass(eq=False)
class LayerContext:
    """What a method may know about the layer that it prunes; not to be changed (a frozen class costs more to make).

    Attributes:
        module: transformers' attention module (``module.o_proj.weight`` is ``[d_model, H*D]``).
        layer_idx, num_layers: its place in the model.
        budgets: tokens to keep per head, for each sequence.
        lengths: real tokens of each sequence among the N columns.
        bounds: ``[B, 2]`` int64 on the cache's device: columns start <= i < stop are real; None when all are.
        scale: factor on the logits of attention.
        rotary: the layer's rotary embedding; None where it is not understood, which a method whose traits have
            ``rotates`` or ``reads_rotary`` never meets.
        cos, sin: ``[B or 1, Q, D]`` in the model's dtype: what the channels of the queries, in the order of
            ``rotary.to_halves``, were multiplied by. None for methods whose traits lack
            ``reads_rotary``.
        hidden: ``[B, Q, d_model]``, the layer's input at the queries (while text is generated, at the last of them).
        positions: ``[B, G, N]`` int64, the position of each cached token in its sequence; None: column i is position
            ``i - bounds[b, 0]``.
        previous: ``[B, G, N-Q]`` float32, the scores that the columns before the queries had when they were kept, for
            methods whose traits have ``uses_previous``; None when Q = N.
        final: whether this is the last pruning of the prefill (False between chunks).
        scoring_pass: the scoring pass that is under way, where the method asked for one: the last Q of the N columns
            are then the appended tokens, which count as real ones and are dropped whatever they score.
        surprise: ``[B, T]`` float32, for methods whose traits have ``reads_surprise``, in ``across``: the negative
            log-likelihood in nats of each token of the prefill so far, given those before it; 0 for the first. Column
            t is position t, and in a padded batch column t of the batch.
        memo: for what is the same in all layers of one forward pass, by a key of the method's.
    """

    module: Any
    layer_idx: int
    num_layers: int
    budgets: tuple[int, ...]
    lengths: tuple[int, ...]
    bounds: Tensor | None
    scale: float
    rotary: Rotary
    cos: Any
    sin: Any
    hidden: Tensor
    positions: Tensor | None = None
    previous: Tensor | None = None
    final: bool = True
    scoring_pass: ScoringPass | None = None
    surprise: Tensor | None = None
    memo: dict[Any, Any] = field(default_factory=dict)

    @property
    def budget(self) -> int:
        """The largest of ``budgets``."""
        return max(self.budgets)

    def last_queries(self, q: Tensor, count: int, num_columns: int) -> Tensor:
        """The queries ``[B, H, w, D]`` of the last w = min(count, Q) real tokens of each sequence.

        Args:
            q: ``[B, H, Q, D]``, of the last Q of ``num_columns`` columns.
        """
        width = min(count, q.shape[2])
        if self.bounds is None:
            return q[:, :, -width:]
        last = self.bounds[:, 1] - (num_columns - q.shape[2])
        rows = (last[:, None] - width + torch.arange(width, device=q.device)).clamp(0, q.shape[2] - 1)
        return q.gather(2, rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))

    def protect(self, scores: Tensor, *, sink: int = 0, window: int = 0) -> Tensor:
        """``scores [B, G, N]`` with the first ``sink`` and last ``window`` real tokens at +inf, padding at -inf."""
        num_columns = scores.shape[2]
        if self.bounds is None:
            if sink or window:
                scores = scores.clone()
                scores[:, :, :sink] = math.inf
                scores[:, :, max(num_columns - window, 0) :] = math.inf
            return scores
        column = torch.arange(num_columns, device=scores.device)
        start, stop = (edge[:, None, None] for edge in self.bounds.unbind(1))
        scores = scores.masked_fill((column < start + sink) | (column >= stop - window), math.inf)
        return scores.masked_fill((column < start) | (column >= stop), -math.inf)
