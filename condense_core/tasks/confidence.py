"""Confidence intervals of an evaluation, and comparisons of two ways to give the context question by question.

Questions about one context are not independent: a context that is hard is hard for all of them. What is resampled is
therefore the context with all of its questions, a cluster (Field and Welsh 2007, "Bootstrapping clustered data", JRSS B
69(3); for evaluations of language models Miller 2024, arXiv 2411.00640). Intervals are 95% percentile intervals (Efron
and Tibshirani 1993, chapter 13) from 10,000 resamples. Ratios and differences of two methods are computed on the same
resamples, so that what both have in common, the contexts, cancels.

A value here is a ratio of two sums over contexts: right answers over questions, right answers with soft tokens over
those with the full text, loss saved over loss that could be saved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

LEVEL = 0.95
NUM_RESAMPLES = 10_000
_SEED = 20_26
#: A ratio whose denominator is not positive in more than this share of the resamples has no interval.
_MOST_UNDEFINED = 0.05

Bounds = list[float]
"""``[low, high]``, as JSON has it."""


def cluster_sums(values: Sequence[float], clusters: Sequence[int]) -> dict[int, float]:
    """The sum of ``values`` in each of the ``clusters``, which are given value by value."""
    sums: dict[int, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value
    return sums


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> Bounds | None:
    """The interval of ``sum(numerators) / sum(denominators)``, of which each cluster gives one.

    None for fewer than two clusters, for values that are not finite, and where the denominator is not clearly positive.
    """
    if len(numerators) < 2:
        return None
    above, below = (torch.tensor(values, dtype=torch.float64) for values in (numerators, denominators))
    if not bool(above.isfinite().all() and below.isfinite().all()):
        return None
    counts = _resamples(len(numerators))
    above, below = counts @ above, counts @ below
    defined = below > 0
    if float(defined.double().mean()) < 1 - _MOST_UNDEFINED:
        return None
    return _bounds(above[defined] / below[defined])


def share_interval(values: Sequence[float], clusters: Sequence[int]) -> Bounds | None:
    """The interval of the mean of ``values`` in [0, 1].

    Where all are 0, or all 1, every resample is the same and says nothing. The interval is then that of Clopper and
    Pearson (1934) for so many questions, as if they were independent.
    """
    bounds = mean_interval(values, clusters)
    if bounds is None or len(set(values)) > 1 or values[0] not in (0.0, 1.0):
        return bounds
    reach = ((1 - LEVEL) / 2) ** (1 / len(values))
    return [0.0, 1 - reach] if values[0] == 0.0 else [reach, 1.0]


def mean_interval(values: Sequence[float], clusters: Sequence[int]) -> Bounds | None:
    """The interval of the mean of ``values``, one for each question; ``clusters``: the context of each."""
    sums, counts = cluster_sums(values, clusters), cluster_sums([1.0] * len(values), clusters)
    return ratio_interval(list(sums.values()), list(counts.values()))


@dataclass(frozen=True)
class Difference:
    """How two methods differ on the questions that both were asked.

    Attributes:
        difference: mean of the first less mean of the second.
        interval: of it; None for fewer than two contexts.
        p: probability of a difference at least as large, in either direction, if the two were the same: the share of
            random swaps of the methods, context by context, that give one. It cannot be below 2^(1 - contexts).
        first_better, second_better: questions on which one of them is better.
        num_questions, num_contexts: that were compared.
    """

    first: float
    second: float
    difference: float
    interval: Bounds | None
    p: float
    first_better: int
    second_better: int
    num_questions: int
    num_contexts: int

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def compare(first: Sequence[float], second: Sequence[float], clusters: Sequence[int]) -> Difference:
    """Compare what two methods got for the same questions; ``clusters``: the context of each question.

    The interval is that of the paired bootstrap, p that of a paired randomisation test, both over contexts.

    Raises:
        ValueError: there is no question, or the three differ in length.
    """
    if not first or not len(first) == len(second) == len(clusters):
        raise ValueError(
            f"first, second, clusters: got {len(first)}, {len(second)} and {len(clusters)} values; expected as many of "
            "each, at least one"
        )
    differences = [a - b for a, b in zip(first, second, strict=True)]
    sums = torch.tensor(list(cluster_sums(differences, clusters).values()), dtype=torch.float64)
    return Difference(
        first=math.fsum(first) / len(first),
        second=math.fsum(second) / len(first),
        difference=math.fsum(differences) / len(first),
        interval=mean_interval(differences, clusters),
        p=_swapped(sums),
        first_better=sum(d > 0 for d in differences),
        second_better=sum(d < 0 for d in differences),
        num_questions=len(first),
        num_contexts=len(sums),
    )


def _swapped(sums: Tensor) -> float:
    """The share of sign changes of ``sums [C]`` whose total is at least as far from 0; all of them if there are few."""
    count = len(sums)
    if 2**count <= NUM_RESAMPLES:
        signs = 1.0 - 2.0 * ((torch.arange(2**count)[:, None] >> torch.arange(count)) & 1).double()
        extra = 0
    else:
        generator = torch.Generator().manual_seed(_SEED)
        signs = 1.0 - 2.0 * torch.randint(2, (NUM_RESAMPLES, count), generator=generator).double()
        extra = 1  # the data themselves are one of the possible swaps
    totals = (signs @ sums).abs()
    reached = int((totals >= sums.sum().abs() - 1e-9).sum())
    return (reached + extra) / (len(totals) + extra)


@lru_cache(maxsize=8)
def _resamples(count: int) -> Tensor:
    """``[R, count]`` float64: how often each of ``count`` clusters is drawn in each resample; always the same."""
    generator = torch.Generator().manual_seed(_SEED)
    drawn = torch.randint(count, (NUM_RESAMPLES, count), generator=generator)
    return torch.zeros(NUM_RESAMPLES, count, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(NUM_RESAMPLES, count, dtype=torch.float64)
    )


def _bounds(values: Tensor) -> Bounds:
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return [low, high]
