"""Copies: answers to one challenge that are the same vectors in another order, scale, number or with noise.

All of a group share one reward by their scores, however many hotkeys gave it. Two miners who run the same checkpoint
are a group as well: what both have is worth no more than what one has.

Noise is what a copy is hidden under, and an LLM reads through much of it. It lies in all directions alike, where the
answers to one text lie in few: compared in the directions that matter most to all answers together, copies under so
much noise that they are worth a third are still alike, and compressors that were trained apart are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

ALIKE = 0.8
"""Mean cosine from which answers count as one. Measured with the embedded model, in the main directions of the answers
to one text: compressors trained from different beginnings have 0.64 (0.70 at most), two copies of one answer with noise
of 0.75 of its spread 0.83, an answer and its copy with as much noise as spread 0.80 to 0.85, one checkpoint at two
ratios 0.79 to 0.83. Short trainings of one recipe, which all begin at the means of embeddings, have 0.81 to 0.94: they
count as one until they have learned more than that."""
_MAIN = 64  # directions
_MOST_ROWS = 2048  # that the directions are found from
_LEAST_ROWS = 4
_SKETCH, _PROBES, _MARGIN = 64, 32, 0.1


def shares(
    answers: Mapping[str, Tensor], scores: Mapping[str, float], *, alike: float = ALIKE, seed: int = 0
) -> dict[str, float]:
    """By what each answer's score is multiplied: its part of the scores of its group.

    A group so gets no more than the best of it would alone, and who answers worse than what it is alike to takes less.

    Args:
        answers: ``[k, d]`` by hotkey, finite. scores: of each, in [0, 1].
        alike: of ``similarity``, from which two are a group.
        seed: of the sketches, rows and directions in which pairs are looked for; a validator's own secret.
    """
    names = sorted(answers)
    parent = {name: name for name in names}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    rows = {name: _directions(answers[name]) for name in names}
    main, sketches = _in_main_directions(rows, seed), _sketched(rows, seed)
    for where, looked in ((main, main), (rows, sketches)):
        for one, other in _suspects(looked, alike - _MARGIN, seed):
            if root(one) != root(other) and _alike(where[one], where[other]) >= alike:
                parent[root(other)] = root(one)
    groups: dict[str, list[float]] = {}
    for name in names:
        groups.setdefault(root(name), []).append(scores[name])
    return {name: scores[name] / sum(groups[root(name)]) if scores[name] > 0 else 0.0 for name in names}


def similarity(one: Tensor, other: Tensor) -> float:
    """In [-1, 1]: the mean cosine of each row of one answer with the nearest of the other, of the better direction.

    Rows are centred on the mean of their answer first: all soft tokens share a large component that says nothing. Their
    order, a common scale and left out rows change nothing. It is the larger one of all directions and of the main ones.
    """
    rows = {"one": _directions(one), "other": _directions(other)}
    main = _in_main_directions(rows, 0)
    return max(_alike(rows["one"], rows["other"]), _alike(main["one"], main["other"]))


def _directions(answer: Tensor) -> Tensor:
    """``[k, d]`` of unit rows in fp32; an answer of few rows is not centred, which would leave nothing of it."""
    rows = answer.detach().float().cpu()
    rows = rows / rows.abs().max().clamp(min=torch.finfo(torch.float32).tiny)  # squares of huge values stay finite
    if len(rows) >= _LEAST_ROWS:
        rows = rows - rows.mean(0)
    return F.normalize(rows, dim=1)


def _in_main_directions(rows: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Unit rows ``[k, r]`` in the directions in which all answers of a width together have the most."""
    bases = {
        width: _main_directions([own for own in rows.values() if own.shape[1] == width], seed)
        for width in {own.shape[1] for own in rows.values()}
    }
    return {name: F.normalize(own @ bases[own.shape[1]], dim=1) for name, own in rows.items()}


def _main_directions(answers: Iterable[Tensor], seed: int) -> Tensor:
    """``[d, r]``: an orthonormal basis, found by subspace iteration; every answer counts alike, however many rows."""
    scaled = torch.cat([own / len(own) ** 0.5 for own in answers])
    scaled = scaled[:: -(-len(scaled) // _MOST_ROWS)]
    generator = torch.Generator().manual_seed(seed)
    size = min(_MAIN + 16, *scaled.shape)
    found = torch.randn(scaled.shape[1], size, generator=generator)
    for _ in range(4):
        found = torch.linalg.qr(scaled.T @ (scaled @ found)).Q
    values, vectors = torch.linalg.eigh((scaled @ found).T @ (scaled @ found))
    return found @ vectors[:, values.argsort(descending=True)[:_MAIN]]


def _sketched(rows: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Random projections, which keep cosines to 1/8, and far better where rows are nearly the same."""
    generator = torch.Generator().manual_seed(seed)
    bases: dict[int, Tensor] = {}
    for width in sorted({own.shape[1] for own in rows.values()}):
        bases[width] = torch.randn(width, _SKETCH, generator=generator)
    return {
        name: F.normalize(own @ bases[own.shape[1]], dim=1) if own.shape[1] > _SKETCH else own
        for name, own in rows.items()
    }


def _suspects(rows: Mapping[str, Tensor], near_enough: float, seed: int) -> Iterator[tuple[str, str]]:
    """Pairs that may be alike: some rows of one have near ones in the other.

    Of 64 miners all pairs in full took a third of the time in which the embedded model reads them.
    """
    generator = torch.Generator().manual_seed(seed)
    by_width: dict[int, list[str]] = {}
    for name, own in rows.items():
        by_width.setdefault(own.shape[1], []).append(name)
    for _, names in sorted(by_width.items()):
        drawn = [rows[name][torch.randint(len(rows[name]), (_PROBES,), generator=generator)] for name in names]
        probes = torch.cat(drawn)  # [n * _PROBES, r]
        near = torch.stack([(probes @ rows[name].T).amax(1).view(-1, _PROBES).mean(1) for name in names])
        for i, j in (torch.maximum(near, near.T).triu(1) >= near_enough).nonzero().tolist():
            yield names[i], names[j]


def _alike(one: Tensor, other: Tensor) -> float:
    if one.shape[1] != other.shape[1]:
        return -1.0
    cosines = one @ other.T
    return float(torch.maximum(cosines.amax(1).mean(), cosines.amax(0).mean()))
