"""Copies: answers to one challenge that are the same vectors in another order, scale, number or with noise.

All of a group share one reward, however many hotkeys gave it. Two miners who run the same checkpoint are a group as
well: what both have is worth no more than what one has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

ALIKE = 0.97
"""Mean cosine from which answers count as one; noise below a quarter of a vector's norm keeps it."""
_LEAST_ROWS = 4
_SKETCH, _PROBES, _SUSPECT = 64, 32, 0.85


def shares(answers: Mapping[str, Tensor], *, alike: float = ALIKE, seed: int = 0) -> dict[str, float]:
    """By what each answer's score is multiplied: 1 over the size of its group.

    Args:
        answers: ``[k, d]`` by hotkey, finite. alike: of ``similarity``, from which two are a group.
        seed: of the sketches and rows in which pairs are looked for; a validator's own secret.
    """
    names = sorted(answers)
    parent = {name: name for name in names}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    rows = {name: _directions(answers[name]) for name in names}
    for one, other in _suspects(rows, seed):
        if root(one) != root(other) and _alike(rows[one], rows[other]) >= alike:
            parent[root(other)] = root(one)
    roots = [root(name) for name in names]
    return {name: 1 / roots.count(own) for name, own in zip(names, roots, strict=True)}


def similarity(one: Tensor, other: Tensor) -> float:
    """In [-1, 1]: the mean cosine of each row of one answer with the nearest of the other, of the better direction.

    Rows are centred on the mean of their answer first: all soft tokens share a large component that says nothing. Their
    order, a common scale and left out rows change nothing.
    """
    return _alike(_directions(one), _directions(other))


def _directions(answer: Tensor) -> Tensor:
    """``[k, d]`` of unit rows in fp32; an answer of few rows is not centred, which would leave nothing of it."""
    rows = answer.detach().float().cpu()
    rows = rows / rows.abs().max().clamp(min=torch.finfo(torch.float32).tiny)  # squares of huge values stay finite
    if len(rows) >= _LEAST_ROWS:
        rows = rows - rows.mean(0)
    return F.normalize(rows, dim=1)


def _suspects(rows: Mapping[str, Tensor], seed: int) -> Iterator[tuple[str, str]]:
    """Pairs that may be alike: some rows of one have near ones in the other, in random projections of both.

    Projections keep cosines to 1/8, and far better where rows are nearly the same. Of 64 miners all pairs in full took
    a third of the time in which the embedded model reads them.
    """
    generator = torch.Generator().manual_seed(seed)
    by_width: dict[int, list[str]] = {}
    for name, own in rows.items():
        by_width.setdefault(own.shape[1], []).append(name)
    for width, names in sorted(by_width.items()):
        base = torch.randn(width, _SKETCH, generator=generator)
        sketches = [F.normalize(rows[name] @ base, dim=1) if width > _SKETCH else rows[name] for name in names]
        drawn = [own[torch.randint(len(own), (_PROBES,), generator=generator)] for own in sketches]
        probes = torch.cat(drawn)  # [n * _PROBES, _SKETCH]
        near = torch.stack([(probes @ own.T).amax(1).view(-1, _PROBES).mean(1) for own in sketches])
        for i, j in (torch.maximum(near, near.T).triu(1) >= _SUSPECT).nonzero().tolist():
            yield names[i], names[j]


def _alike(one: Tensor, other: Tensor) -> float:
    if one.shape[1] != other.shape[1]:
        return -1.0
    cosines = one @ other.T
    return float(torch.maximum(cosines.amax(1).mean(), cosines.amax(0).mean()))
