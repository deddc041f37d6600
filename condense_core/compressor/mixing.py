"""``mixed``: some tokens of a text stay as they are, in place, and the others share soft tokens.

At small budgets this keeps what pooling loses, since a name or a number that stands there exact can be read off (exact
user turns with the rest pooled lost nothing where uniform pooling lost two fifths: LatentPress, arXiv 2609.01507).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from condense_core.compressor.config import num_kept
from condense_core.compressor.selection import RUN, keep_sentences


@dataclass(frozen=True)
class Mixture:
    """What becomes of the T tokens of a pack.

    Attributes:
        exact: int64 ``[E]``, ascending indices of the tokens that stay.
        pooled: int64 ``[T - E]``, ascending indices of the others.
        cu_seqlens: offsets of the sequences in ``pooled``; windows begin anew in each.
        order: int64 ``[K]``: row i of the result is row ``order[i]`` of the exact rows followed by the pooled ones, so
            that rows stand in the order of the text. A pooled row stands where its last token does.
    """

    exact: Tensor
    pooled: Tensor
    cu_seqlens: list[int]
    order: Tensor


def num_exact(num_tokens: int, ratio: float, window: int) -> int:
    """The most of n tokens that can stay: s, where s + ceil((n - s) / window) = ceil(n / ratio)."""
    rows = num_kept(num_tokens, ratio)
    return min(num_tokens, (rows * window - num_tokens) // (window - 1))


def mix(scores: Tensor, cu_seqlens: list[int], ratio: float, window: int, sentences: list[int] | None) -> Mixture:
    """Which tokens stay, and the order of what becomes of the pack; every sequence gets ceil(n / ratio) rows.

    Args:
        scores: ``[T]``, larger stays.
        cu_seqlens: offsets of the sequences.
        ratio: tokens per row, at most ``window``.
        window: tokens that share a row where they do not stay.
        sentences: for each token the number of its sentence, ascending without gaps; None: runs of ``RUN`` tokens
            stand for sentences.
    """
    exact, pooled, ends, places = [], [], [0], []
    for start, stop in pairwise(cu_seqlens):
        n = stop - start
        own = torch.arange(n) // RUN if sentences is None else torch.tensor(sentences[start:stop])
        kept = keep_sentences(scores[start:stop], own - own[:1], num_exact(n, ratio, window))
        stays = torch.zeros(n, dtype=torch.bool)
        stays[kept] = True
        others = (~stays).nonzero().squeeze(1)
        exact.append(start + kept)
        pooled.append(start + others)
        ends.append(ends[-1] + len(others))
        last = torch.arange(window - 1, len(others) + window - 1, window).clamp_max(max(len(others) - 1, 0))
        places.append(start + others[last])
    order = torch.cat([*exact, *places]).argsort(stable=True)
    return Mixture(torch.cat(exact), torch.cat(pooled), ends, order)
