"""What the oracles of several ops share: loops over Python's floats, one number after the other, as the formulas say.

They take tensors of any dtype and compute in double precision, so that what is left of a difference is the op's.
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

INF = float("inf")

Bounds = list[list[int]] | None
"""First real token of each sequence and the one behind its last, as given to an op: beyond the tokens, or crossed."""


def cumulative(lengths: list[int]) -> Tensor:
    """Offsets of packed sequences of these lengths."""
    return torch.tensor([0, *itertools.accumulate(lengths)])


def on_device(bounds: Bounds) -> Tensor | None:
    """Bounds as an op takes them."""
    return None if bounds is None else torch.tensor(bounds)


def real_tokens(bounds: Bounds, sequence: int, num_tokens: int) -> range:
    """The real tokens of a sequence: bounds are clamped, and an end before the start leaves none."""
    start, stop = (0, num_tokens) if bounds is None else (min(max(end, 0), num_tokens) for end in bounds[sequence])
    return range(start, stop)


def norm(x: list[float]) -> float:
    """The Euclidean norm."""
    return math.sqrt(math.fsum(c * c for c in x))


def softmax(logits: list[float]) -> list[float]:
    """Weights that add up to 1, safe against overflow; none for no logits."""
    top = max(logits, default=0.0)
    weights = [math.exp(logit - top) for logit in logits]
    return [weight / math.fsum(weights) for weight in weights]


def attention(q: list[float], keys: list[list[float]], scale: float) -> list[float]:
    """The attention that a query gives to each of some keys."""
    return softmax([scale * math.fsum(a * b for a, b in zip(q, key, strict=True)) for key in keys])


def score_sequences(
    score: Callable[..., list[float]], *tensors: Tensor, bounds: Bounds, sink: int = 0, window: int = 0
) -> Tensor:
    """`[B, G, N]`: what `score` gives for the real tokens of every sequence and head, as lists of rows.

    -inf for padding, +inf for the first `sink` and the last `window` real tokens.
    """
    batch, heads, num_tokens, _ = tensors[0].shape
    out = torch.full((batch, heads, num_tokens), -INF, dtype=torch.float64)
    for b, g in itertools.product(range(batch), range(heads)):
        real = real_tokens(bounds, b, num_tokens)
        scores = score(*([x[b, g, i].tolist() for i in real] for x in tensors))
        for place, (i, value) in enumerate(zip(real, scores, strict=True)):
            out[b, g, i] = INF if place < sink or place >= len(real) - window else value
    return out


def rms_norm(x: Tensor, norm_weight: Tensor | None, eps: float) -> list[list[float]]:
    """`x / sqrt(mean(x^2) + eps) * norm_weight`, row by row."""
    rows = []
    for row in x.double().tolist():
        root = math.sqrt(math.fsum(value * value for value in row) / len(row) + eps)
        weight = [1.0] * len(row) if norm_weight is None else norm_weight.double().tolist()
        rows.append([value / root * w for value, w in zip(row, weight, strict=True)])
    return rows


def attend(
    query: Tensor, rows: list[list[float]], scale: float | None = None, bias: list[list[float]] | None = None
) -> list[float]:
    """One row of a pooling: query `[H, d/H]` over the given rows of width d, bias `[H][len(rows)]`."""
    out: list[float] = []
    heads, head_dim = query.shape
    factor = 1 / math.sqrt(head_dim) if scale is None else scale
    for h in range(heads):
        own = [row[h * head_dim : (h + 1) * head_dim] for row in rows]
        q = query[h].double().tolist()
        logits = [factor * math.fsum(a * b for a, b in zip(q, r, strict=True)) for r in own]
        if bias is not None:
            logits = [logit + b for logit, b in zip(logits, bias[h], strict=True)]
        weights = softmax(logits)
        out += [math.fsum(w * r[c] for w, r in zip(weights, own, strict=True)) for c in range(head_dim)]
    return out


def rotation_matrix(cos: Tensor, sin: Tensor) -> Tensor:
    """`R` with `R x = cos x + sin rotate_half(x)`, entry by entry."""
    d = len(cos)
    matrix = torch.diag(cos)
    for i in range(d // 2):
        matrix[i, i + d // 2] = -sin[i]
        matrix[i + d // 2, i] = sin[i + d // 2]
    return matrix
