"""select: the specification against Python's sort, the public function, and its registration."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core import ops
from condense_core.ops import reference

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

NAN, INF = float("nan"), float("inf")


def oracle(scores: Tensor, budget: int, scope: str, protect: Tensor | None) -> tuple[list[list[int]], list[list[int]]]:
    """Python's sort over (class, score, head, token): kept tokens of each row, and how many each head keeps."""
    kept: list[list[int]] = []
    counts: list[list[int]] = []
    for b, heads in enumerate(scores.tolist()):
        ranges = [] if protect is None else protect[b if len(protect) > 1 else 0].tolist()
        entries = []
        for g, row in enumerate(heads):
            for i, score in enumerate(row):
                if score == -INF:
                    continue
                forced = score == INF or any(start <= i < stop for start, stop in ranges)
                rank = (0, 0.0) if forced else (2, 0.0) if math.isnan(score) else (1, -score)
                entries.append((rank, g, i))
        if scope == "layer":
            best = sorted(entries)[: budget * len(heads)]
        else:
            best = [e for g in range(len(heads)) for e in sorted(e for e in entries if e[1] == g)[:budget]]
        rows = [sorted(i for _, head, i in best if head == g) for g in range(len(heads))]
        kept += [[i for row in rows for i in row]] if scope == "layer" else rows
        counts.append([len(row) for row in rows])
    return kept, counts


def check(scores: Tensor, budget: int, scope: Any, protect: Tensor | None = None) -> None:
    indices, counts = ops.select(scores, budget, scope=scope, protect=protect)
    kept, expected_counts = oracle(scores, budget, scope, protect)
    batch, heads, tokens = scores.shape
    width = min(budget, tokens)
    assert indices.dtype == counts.dtype == torch.int64
    assert list(indices.shape) == ([batch, heads * width] if scope == "layer" else [batch, heads, width])
    assert counts.tolist() == expected_counts
    width *= heads if scope == "layer" else 1
    assert indices.view(-1, width).tolist() == [row + [-1] * (width - len(row)) for row in kept] if width else True


@pytest.mark.parametrize("scope", ["head", "layer"])
@pytest.mark.parametrize("budget", [0, 1, 3, 7, 8, 100])
def test_ties_nan_padding_and_forced_tokens(budget: int, scope: str) -> None:
    scores = torch.tensor(
        [
            [[1.0, 0.0, -0.0, 1.0, NAN, -INF, INF, 0.0], [NAN] * 8],
            [[-INF] * 8, [2.0, -3e38, -INF, NAN, NAN, 2.0, 2.0, -INF]],
        ]
    )
    check(scores, budget, scope)
    protect = torch.tensor([[[0, 1], [5, 7]], [[-3, 2], [9, 4]]])
    check(scores, budget, scope, protect)
    check(scores, budget, scope, protect[:1].int())
    check(scores, budget, scope, protect[:, :0])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_scores(data: st.DataObject) -> None:
    batch, heads, tokens = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(0, 20)))
    values = st.sampled_from([0.0, -0.0, 1.0, 2.0, -1.5, NAN, INF, -INF, 1e-40, -1e-40])
    size = batch * heads * tokens
    scores = torch.tensor(data.draw(st.lists(values, min_size=size, max_size=size))).view(batch, heads, tokens)
    ranges = data.draw(st.lists(st.tuples(st.integers(-2, 22), st.integers(-2, 22)), max_size=2))
    protect = torch.tensor(ranges).view(1, -1, 2) if ranges else None
    check(scores, data.draw(st.integers(0, 25)), data.draw(st.sampled_from(["head", "layer"])), protect)


def test_strides_do_not_matter() -> None:
    scores = torch.randn(2, 50, 3).transpose(1, 2)
    assert all(map(torch.equal, ops.select(scores, 9), ops.select(scores.contiguous(), 9)))
    assert all(map(torch.equal, ops.select(scores, 9), reference.select(scores, 9)))


def test_it_passes_opcheck() -> None:
    arguments = (torch.randn(2, 3, 50), 9, True, torch.tensor([[[0, 2]]]))
    torch.library.opcheck(torch.ops.condense_core.select.default, arguments)


def test_it_is_traced_without_a_break() -> None:
    scores = torch.randn(2, 3, 50)
    compiled = torch.compile(lambda s: ops.select(s, 4, scope="layer"), fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(scores), ops.select(scores, 4, scope="layer")))


SCORES = torch.zeros(2, 3, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param({"scores": [1.0]}, TypeError, "scores is a list, expected a torch.Tensor", id="scores of list"),
        pytest.param(
            {"scores": SCORES.half()},
            TypeError,
            "scores is torch.float16 .*expected a dense torch.float32",
            id="16 bits",
        ),
        pytest.param(
            {"scores": SCORES[0]}, ValueError, r"scores has shape \[3, 8\], expected \[B, G, N\]", id="rank of scores"
        ),
        pytest.param({"budget": -1}, ValueError, "budget is -1, expected an int >= 0", id="negative budget"),
        pytest.param({"budget": 2.0}, TypeError, "budget is 2.0", id="budget of float"),
        pytest.param(
            {"scope": "model"}, ValueError, "scope is 'model', expected 'head' or 'layer'", id="unknown scope"
        ),
        pytest.param(
            {"protect": torch.zeros(2, 2)}, TypeError, "protect has dtype torch.float32", id="ranges of floats"
        ),
        pytest.param(
            {"protect": torch.zeros(2, 2, dtype=torch.int32)},
            ValueError,
            r"protect has shape \[2, 2\]",
            id="rank of ranges",
        ),
        pytest.param(
            {"protect": torch.zeros(3, 1, 2, dtype=torch.int32)},
            ValueError,
            "expected .* with B = 2",
            id="ranges of three sequences",
        ),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.select(**{"scores": SCORES, "budget": 2, **change})
