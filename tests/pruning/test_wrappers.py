"""Every wrapper against its definition in loops, alone and inside others, with padding, dtypes and head groups."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pruning_layers as layers
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding, apply_rotary_pos_emb

from condense_core import ops
from condense_core.pruning.base import Kept, LayerContext, Method, ScoringPass, Traits, Wrapper
from condense_core.pruning.methods.snapkv import SnapKV
from condense_core.pruning.wrappers import (
    WRAPPERS,
    AdaKV,
    ChunkKV,
    CriticalKV,
    Decoding,
    Merge,
    PerLayer,
    PyramidKV,
    QueryAware,
    Rerotate,
    Threshold,
    merge,
)
from condense_core.pruning.wrappers.kept import kept_mask

INF, NAN = math.inf, math.nan
LENGTHS = (61, 47, 55)
PADDINGS = ("none", "left", "right")
HEADS = [(8, 2), (32, 8)]
DTYPES = [torch.float32, torch.bfloat16]
# Relative to an oracle in float64 of the same inputs. fp32: sums of some hundred products, each rounded to 2^-24. bf16:
# the result is rounded to 2^-9 once; the rest, in fp32, is far below that.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2**-8}


class Given(Method):
    """A method whose scores are given: an oracle can be exact."""

    def __init__(self, scores: Tensor, budget: float, protected: int = 0, traits: Traits | None = None) -> None:
        self.scores, self.budget, self._protected, self._traits = scores, budget, protected, traits or Traits()

    def score(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        return self.scores

    def num_kept(self, num_tokens: int, layer_idx: int, num_layers: int) -> int:
        return min(num_tokens, int(self.budget if self.budget > 1 else self.budget * num_tokens))

    @property
    def protected(self) -> int:
        return self._protected

    @property
    def traits(self) -> Traits:
        return self._traits


def batch(padding: str, heads: tuple[int, int] = (8, 2), dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    lengths = LENGTHS if padding != "none" else (61, 61)
    return layers.build(heads=heads[0], kv_heads=heads[1], lengths=lengths, padding=padding, dtype=dtype, **options)


def random_scores(layer: Any, *, window: int = 0, levels: int | None = None) -> Tensor:
    """Scores >= 0, of few ``levels`` where ties are wanted, a window at +inf, padding at -inf."""
    scores = torch.rand(layer.k.shape[:3], generator=torch.Generator().manual_seed(1))
    if levels:
        scores = (scores * levels).floor() / levels
    return layer.ctx.protect(scores, window=window)


def run(method: Method, layer: Any, **changes: Any) -> tuple[Tensor, Kept, Tensor, Tensor]:
    """Scores, selection, keys and values, as a session calls for them."""
    ctx = layer.context(method, **changes)
    scores = method.score(layer.module, layer.q, layer.k, layer.v, ctx)
    kept = method.select(scores, ctx)
    return scores, kept, *method.compact(layer.k, layer.v, kept, ctx)


def chosen(layer: Any, kept: Kept) -> list[list[int]]:
    return layers.columns(kept, layer.k.shape[0] * layer.k.shape[1])


def ranking(scores: list[float]) -> list[int]:
    """Columns from the best to the worst, without padding."""
    real = [i for i, score in enumerate(scores) if score != -INF]
    return sorted(real, key=lambda i: (math.isnan(scores[i]), -scores[i] if not math.isnan(scores[i]) else 0, i))


def best(scores: list[float], count: int) -> list[int]:
    return sorted(ranking(scores)[:count])


# --- AdaKV


def shared(scores: list[list[float]], budget: int, least: int) -> list[list[int]]:
    """Each head its own best ``least``; the other places of the layer to the highest scores, the earlier head first."""
    own = [ranking(row)[:least] for row in scores]
    rest = [(-score, g, i) for g, row in enumerate(scores) for i, score in enumerate(row) if i not in own[g]]
    for _, g, i in sorted(entry for entry in rest if entry[0] != INF)[: len(scores) * (budget - least)]:
        own[g].append(i)
    return [sorted(row) for row in own]


@pytest.mark.parametrize("floor", [0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("padding", PADDINGS)
def test_heads_share_the_budget_of_their_layer(padding: str, heads: tuple[int, int], floor: float) -> None:
    layer = batch(padding, heads)
    # Heads of very different scores, so that sharing is far from equal; few levels, so that there are ties.
    scores = random_scores(layer, levels=8) * torch.arange(1, heads[1] + 1)[:, None]
    method = AdaKV(Given(scores, 0.5), floor)
    _, kept, _, _ = run(method, layer)
    expected = []
    for b, budget in enumerate(layer.context(method).budgets):
        expected += shared(scores[b].tolist(), budget, int(floor * budget))
    assert chosen(layer, kept) == expected
    counts = [len(row) for row in expected]
    assert sum(counts) == heads[1] * sum(layer.context(method).budgets)
    assert (len(set(counts[: heads[1]])) > 1) == (floor < 1)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("budget", [1, 5, 11, 12, 13, 30])
def test_tokens_forced_in_one_head_take_no_place_of_another(padding: str, budget: int) -> None:
    """With a budget below the window, the first heads would keep all of theirs, and the last ones nothing."""
    layer = batch(padding, (32, 8))
    scores = random_scores(layer, window=12)
    _, kept, _, _ = run(AdaKV(Given(scores, budget + 0.5, protected=12)), layer)
    for n, row in enumerate(chosen(layer, kept)):
        forced = list(layer.real()[n // 8])[-12:]
        assert [i for i in row if i in forced] == forced[: min(budget, 12)]
        assert len(row) == budget if budget <= 12 else len(row) >= 12


def test_between_chunks_heads_keep_equally_many() -> None:
    layer = batch("none")
    scores = random_scores(layer) * torch.tensor([1.0, 9.0])[:, None]
    _, kept, _, _ = run(AdaKV(Given(scores, 20)), layer, final=False)
    assert kept.cu_seqlens is None
    assert chosen(layer, kept) == [best(row, 20) for rows in scores.tolist() for row in rows]


# --- PyramidKV and PerLayer


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 31, 32])
@pytest.mark.parametrize("num_tokens", [10, 100, 1000, 4097])
@pytest.mark.parametrize("keep", [0.01, 0.1, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("beta", [1, 2, 20, 10**6])
def test_a_pyramid_keeps_what_it_was_asked_to(num_layers: int, num_tokens: int, keep: float, beta: int) -> None:
    inner = SnapKV(keep=keep, window=64)
    mean = inner.num_kept(num_tokens, 0, num_layers)
    budgets = [PyramidKV(inner, beta).num_kept(num_tokens, layer_idx, num_layers) for layer_idx in range(num_layers)]
    assert sum(budgets) == num_layers * mean
    assert budgets == sorted(budgets, reverse=True)
    assert min(budgets) >= min(mean, 64)
    assert max(budgets) <= num_tokens
    steps = [a - b for a, b in pairwise(budgets)]
    assert not steps or max(steps) - min(steps) <= 1  # linear, but for rounding
    if num_layers > 1 and beta > 1 and 64 < mean < num_tokens:
        assert budgets[0] > budgets[-1]


def test_a_pyramid_is_kvpresss_where_that_has_one() -> None:
    """n (1 - r) / beta at the end, twice the mean less that at the beginning, where this is the window or more."""
    for num_tokens, keep, beta in ((10_000, 0.2, 20), (8000, 0.25, 4), (4096, 0.125, 2)):
        mean = num_tokens * keep
        low, high = mean / beta, 2 * mean - mean / beta
        assert 64 <= low < high <= num_tokens - 64
        method = PyramidKV(SnapKV(keep=keep), beta)
        for layer_idx in range(32):
            expected = round(high - layer_idx * (high - low) / 31)
            assert method.num_kept(num_tokens, layer_idx, 32) == expected


def test_each_layer_keeps_its_share() -> None:
    method = PerLayer(SnapKV(budget=7), (0.5, 0.1, 1.0))
    assert [method.num_kept(101, layer_idx, 3) for layer_idx in range(3)] == [51, 11, 101]
    with pytest.raises(ValueError, match=r"PerLayer: shares has 3 entries, expected 4, one for each layer"):
        method.num_kept(101, 0, 4)


# --- ChunkKV


def chunk_means(scores: Tensor, positions: list[list[list[int]]], chunk: int) -> Tensor:
    """Over the finite scores of the real tokens at positions of one chunk."""
    result = scores.clone()
    for b, rows in enumerate(scores.tolist()):
        for g, row in enumerate(rows):
            for i, score in enumerate(row):
                if math.isfinite(score):
                    number = positions[b][g][i] // chunk
                    members = [s for s, p in zip(row, positions[b][g], strict=True) if p // chunk == number]
                    members = [s for s in members if math.isfinite(s)]
                    result[b, g, i] = sum(members) / len(members)
    return result


@pytest.mark.parametrize("chunk", [1, 4, 20, 100])
@pytest.mark.parametrize("padding", PADDINGS)
def test_a_token_scores_what_its_chunk_does(padding: str, chunk: int) -> None:
    layer = batch(padding)
    scores = random_scores(layer, window=6)
    start = [columns.start for columns in layer.real()]
    positions = [[[i - first for i in range(scores.shape[2])]] * 2 for first in start]
    method = ChunkKV(Given(scores, 0.5), chunk)
    actual, kept, _, _ = run(method, layer)
    expected = chunk_means(scores, positions, chunk)
    # One rounding to fp32 of a mean in float64.
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    if chunk == 1:
        assert torch.equal(actual, scores)
    for b, budget in enumerate(layer.context(method).budgets):
        for g in range(2):
            assert chosen(layer, kept)[2 * b + g] == best(actual[b, g].tolist(), budget)
            assert set(list(layer.real()[b])[-6:]) <= set(chosen(layer, kept)[2 * b + g])


def test_whole_chunks_stay_and_the_edge_keeps_its_first_tokens() -> None:
    layer = layers.build(lengths=(23,))
    value = torch.tensor([3.0, 1, 4, 2, 5]).repeat_interleave(5)[:23]  # the last chunk has 3 tokens
    scores = (value + torch.tensor([0.1, -0.1, 0.2, -0.2, 0]).repeat(5)[:23]).expand(1, 2, 23).clone()
    scores[0, 1] = scores[0, 1].flip(0)
    _, kept, _, _ = run(ChunkKV(Given(scores, 10), 5), layer)
    assert chosen(layer, kept)[0] == [0, 1, *range(10, 15), 20, 21, 22]


def test_chunks_of_a_pruned_cache_go_by_position() -> None:
    layer = layers.build(lengths=(30,))
    generator = torch.Generator().manual_seed(3)
    positions = torch.stack([torch.randperm(90, generator=generator)[:30].sort().values for _ in range(2)])[None]
    scores = random_scores(layer)
    actual, *_ = run(ChunkKV(Given(scores, 10), 7), layer, positions=positions)
    torch.testing.assert_close(actual, chunk_means(scores, positions.tolist(), 7), rtol=1e-6, atol=0)


def test_forced_and_broken_scores_do_not_poison_their_chunk() -> None:
    layer = layers.build(lengths=(12,))
    scores = torch.tensor([1.0, INF, 3, 5, NAN, 1, INF, INF, INF, INF, 2, 2]).expand(1, 2, 12).clone()
    actual, *_ = run(ChunkKV(Given(scores, 6), 4), layer)
    expected = torch.tensor([3.0, INF, 3, 3, NAN, 1, INF, INF, INF, INF, 2, 2])
    torch.testing.assert_close(actual[0, 0], expected, rtol=1e-6, atol=0, equal_nan=True)


def test_the_question_is_not_part_of_a_chunk() -> None:
    layer = layers.build(lengths=(12,))
    scores = torch.tensor([1.0] * 8 + [2, 4, 100, INF]).expand(1, 2, 12).clone()
    method = ChunkKV(Given(scores, 6), 4)
    ctx = layer.context(method, scoring_pass=ScoringPass(prompt_ids=(1, 2)))
    actual = method.score(layer.module, layer.q[:, :, -2:], layer.k, layer.v, ctx)
    assert actual[0, 0].tolist() == [1.0] * 8 + [3, 3, -INF, -INF]


# --- CriticalKV


def projection_norms(layer: Any) -> Tensor:
    """||W_h v||_1, averaged over the query heads h of a group, in float64."""
    weight, v = layer.module.o_proj.weight.detach().double(), layer.v.double()
    group, head_dim = layer.q.shape[1] // v.shape[1], v.shape[3]
    norms = torch.zeros(v.shape[:3], dtype=torch.float64)
    for h in range(layer.q.shape[1]):
        norms[:, h // group] += (v[:, h // group] @ weight[:, h * head_dim : (h + 1) * head_dim].T).abs().sum(-1)
    return norms / group


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("shared_first", [False, True])
def test_values_decide_about_the_second_half(
    padding: str, heads: tuple[int, int], dtype: torch.dtype, shared_first: bool
) -> None:
    layer = batch(padding, heads, dtype)
    base = SnapKV(keep=0.5, window=8)
    method = CriticalKV(AdaKV(base) if shared_first else base)
    scores = base.score(layer.module, layer.q, layer.k, layer.v, layer.context(base))
    actual, kept, _, _ = run(method, layer)
    critical = (scores.double() + 1e-4) * projection_norms(layer)
    for b, budget in enumerate(layer.context(method).budgets):
        half = budget // 2
        rows = scores[b].tolist()
        first = shared(rows, half, max(half // 5, 8)) if shared_first else [best(row, half) for row in rows]
        for g in range(heads[1]):
            assert (actual[b, g] == INF).nonzero().flatten().tolist() == sorted(first[g])
            others = [i for i in layer.real()[b] if i not in first[g]]
            # The op's norm is a sum of fp32 products of the given values, whatever their dtype.
            torch.testing.assert_close(
                actual[b, g, others].double(), critical[b, g, others], rtol=TOLERANCES[dtype], atol=1e-7
            )
            outside = [i for i in range(actual.shape[2]) if i not in layer.real()[b]]
            assert (actual[b, g, outside] == -INF).all()
            own = chosen(layer, kept)[b * heads[1] + g]
            assert set(first[g]) <= set(own)
            assert shared_first or own == best(actual[b, g].tolist(), budget)


@pytest.mark.parametrize(("first_share", "count"), [(0, 0), (0.01, 1), (0.3, 9), (1.0, 30)])
def test_the_first_share_is_the_methods(first_share: float, count: int) -> None:
    layer = layers.build(lengths=(60,))
    scores = random_scores(layer)
    actual, *_ = run(CriticalKV(Given(scores, 30), 0.0, first_share), layer)
    for g in range(2):
        assert (actual[0, g] == INF).nonzero().flatten().tolist() == best(scores[0, g].tolist(), count)
    finite = actual.isfinite()
    expected = (scores.double() * projection_norms(layer))[finite]
    torch.testing.assert_close(actual[finite].double(), expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("padding", PADDINGS)
def test_heads_compete_for_the_second_half_alone(padding: str) -> None:
    """AdaKV outside: the first half is each head's own, the second the layer's."""
    layer = batch(padding)
    scores = random_scores(layer, window=5)
    method = AdaKV(CriticalKV(Given(scores, 0.5, protected=5)), floor=0.1)
    actual, kept, _, _ = run(method, layer)
    for b, budget in enumerate(layer.context(method).budgets):
        rows = actual[b].tolist()
        for g in range(2):
            assert [i for i, s in enumerate(rows[g]) if s == INF] == best(scores[b, g].tolist(), budget // 2)
        assert chosen(layer, kept)[2 * b : 2 * b + 2] == shared(rows, budget, max(int(0.1 * budget), 5))


def test_earlier_scores_are_not_weighed_twice() -> None:
    layer = layers.build(lengths=(40,))
    scores = random_scores(layer)
    method = CriticalKV(Given(scores, 10, traits=Traits(uses_previous=True)))
    assert torch.equal(run(method, layer, final=False)[0], scores)
    assert not torch.equal(run(method, layer)[0], scores)
    assert not torch.equal(run(CriticalKV(Given(scores, 10)), layer, final=False)[0], scores)


def test_the_question_takes_no_place_of_the_first_half() -> None:
    layer = layers.build(lengths=(40,))
    scores = random_scores(layer, window=8)
    method = CriticalKV(Given(scores, 10))
    ctx = layer.context(method, scoring_pass=ScoringPass(prompt_ids=(1,) * 8))
    actual = method.score(layer.module, layer.q[:, :, -8:], layer.k, layer.v, ctx)
    for g in range(2):
        assert (actual[0, g] == INF).nonzero().flatten().tolist() == best(scores[0, g, :32].tolist(), 5)
    assert (actual[:, :, 32:] == -INF).all()


# --- Rerotate


def turned(keys: Tensor, distance: Tensor, rotary: Any) -> Tensor:
    """Keys as complex numbers, times e^(i * distance * frequency), in float64."""
    low, high = keys.double().chunk(2, -1)
    angle = distance.double()[..., None] * rotary.inv_freq.double()
    moved = torch.complex(low, high) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([moved.real, moved.imag], -1)


def check_rotation(
    layer: Any, kept: Kept, keys: Tensor, values: Tensor | None, positions: list[list[int]] | None = None
) -> None:
    """Key j of each head is the kept one, moved to position j; rows in the order of columns."""
    kv_heads, dtype = layer.k.shape[1], layer.k.dtype
    for n, own in enumerate(chosen(layer, kept)):
        b, g = divmod(n, kv_heads)
        place = positions[n] if positions else [i - layer.real()[b].start for i in range(layer.k.shape[2])]
        distance = torch.arange(len(own)) - torch.tensor([place[i] for i in own])
        expected = turned(layer.k[b, g, own], distance, layer.ctx.rotary)
        # The angle of up to 100 radians is rounded to 2^-18 in fp32; keys are below 8.
        actual = layers.rows(keys, kept)[n].double()
        torch.testing.assert_close(actual, expected, rtol=TOLERANCES[dtype], atol=1e-4 if dtype.itemsize == 4 else 1e-2)
        if values is not None:
            assert torch.equal(layers.rows(values, kept)[n], layer.v[b, g, own])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("inner", [SnapKV(keep=0.4, window=8), ChunkKV(SnapKV(keep=0.4, window=8), 7)], ids=repr)
def test_kept_keys_move_to_the_front(padding: str, heads: tuple[int, int], dtype: torch.dtype, inner: Method) -> None:
    layer = batch(padding, heads, dtype)
    _, kept, keys, values = run(Rerotate(inner), layer)
    check_rotation(layer, kept, keys, values)
    assert [len(row) for row in chosen(layer, kept)] == [
        n for n in layer.context(inner).budgets for _ in range(heads[1])
    ]
    assert (kept.cu_seqlens is None) == (padding == "none")


@pytest.mark.parametrize("padding", PADDINGS)
def test_moved_keys_are_those_of_a_text_without_the_others(padding: str) -> None:
    """The model's own rotary embedding at position j gives what Rerotate makes of the one at position p."""
    layer = batch(padding)
    _, kept, keys, _ = run(Rerotate(SnapKV(keep=0.5, window=8)), layer)
    rotary = MistralRotaryEmbedding(layer.module.config)
    for n, own in enumerate(chosen(layer, kept)):
        raw = layer.raw[n // 2, n % 2, own][None, None]
        _, expected = apply_rotary_pos_emb(raw, raw, *rotary(raw, torch.arange(len(own))[None]))
        torch.testing.assert_close(layers.rows(keys, kept)[n], expected[0, 0], rtol=2e-5, atol=1e-4)


def test_keys_of_a_pruned_cache_move_from_where_they_are() -> None:
    layer = layers.build(lengths=(30,))
    generator = torch.Generator().manual_seed(3)
    positions = torch.stack([torch.randperm(90, generator=generator)[:30].sort().values for _ in range(2)])[None]
    method = Rerotate(SnapKV(budget=12, window=4))
    _, kept, keys, values = run(method, layer, positions=positions)
    check_rotation(layer, kept, keys, values, positions[0].tolist())
    _, kept, keys, _ = run(method, layer, positions=positions, final=False)
    assert torch.equal(keys, layer.k.gather(2, kept.indices[..., None].expand(-1, -1, -1, 8)))


@pytest.mark.parametrize("method", [Rerotate(SnapKV(keep=0.5)), Rerotate(Merge(SnapKV(keep=0.5)))], ids=repr)
def test_rows_are_copied_and_turned_in_one_pass_where_they_can_be(
    monkeypatch: pytest.MonkeyPatch, method: Method
) -> None:
    compact, turns = ops.compact, []

    def spy(*args: Any, **options: Any) -> Any:
        turns.append(options.get("rotate") is not None)
        return compact(*args, **options)

    monkeypatch.setattr(ops, "compact", spy)
    run(method, layers.build())
    assert turns == [not isinstance(method.method, Merge)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("order", ["Rerotate(Merge)", "Merge(Rerotate)"])
def test_keys_move_and_values_merge(padding: str, order: str) -> None:
    layer = batch(padding)
    base = SnapKV(keep=0.3, window=8)
    method: Method = Rerotate(Merge(base)) if order == "Rerotate(Merge)" else Merge(Rerotate(base))
    _, kept, keys, values = run(method, layer)
    check_rotation(layer, kept, keys, None)
    _, _, _, merged = run(Merge(base), layer)
    assert torch.equal(values, merged)
    assert not torch.equal(values, run(base, layer)[3])


# --- Threshold


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("sink", "window"), [(0, 0), (4, 10), (3, 0), (50, 50)])
@pytest.mark.parametrize("threshold", [-1.0, 0.5, 0.75, 2.0])
def test_what_scores_enough_stays(padding: str, threshold: float, sink: int, window: int) -> None:
    layer = batch(padding)
    scores = random_scores(layer, levels=8)  # 0.5 and 0.75 are reached exactly
    scores[0, 0, 20] = NAN
    _, kept, keys, values = run(Threshold(Given(scores, 0.5), threshold, sink, window), layer)
    expected = []
    for b, real in enumerate(layer.real()):
        forced = {*real[:sink], *(real[-window:] if window else ())}
        expected += [[i for i in real if i in forced or scores[b, g, i] >= threshold] for g in range(2)]
    assert chosen(layer, kept) == expected
    for n, own in enumerate(expected):
        assert torch.equal(layers.rows(keys, kept)[n], layer.k[n // 2, n % 2, own])
        assert torch.equal(layers.rows(values, kept)[n], layer.v[n // 2, n % 2, own])


@pytest.mark.parametrize("padding", PADDINGS)
def test_between_chunks_all_stay(padding: str) -> None:
    layer = batch(padding)
    method = Threshold(Given(random_scores(layer), 0.5), 2.0)
    _, kept, _, _ = run(method, layer, final=False)
    assert chosen(layer, kept) == [list(real) for real in layer.real() for _ in range(2)]
    assert (kept.cu_seqlens is None) == (padding == "none")
    assert method.traits.ragged
    assert not method.traits.bounded
    assert method.protected == 68


# --- Merge


def merged_values(layer: Any, kept: list[list[int]], positions: list[list[int]] | None = None) -> list[Tensor]:
    """Each evicted token into its nearest kept neighbour, one after the other, in float64."""
    result = []
    for n, own in enumerate(kept):
        b, g = divmod(n, layer.k.shape[1])
        k, v = layer.k[b, g].double(), layer.v[b, g].double()
        place = positions[n] if positions else list(range(len(k)))
        own = [i for i in own if i >= 0]
        total, mass = {c: v[c].clone() for c in own}, dict.fromkeys(own, 1.0)
        for i in layer.real()[b]:
            if i not in own and own:
                c = min(own, key=lambda c: (abs(place[c] - place[i]), c))
                weight = min(1.0, math.exp(min(700.0, layer.ctx.scale * float(k[i] @ k[c] - k[c] @ k[c]))))
                total[c] += weight * v[i]
                mass[c] += weight
        result.append(torch.stack([total[c] / mass[c] for c in own]) if own else v[:0])
    return result


def check_merged(layer: Any, kept: Kept, values: Tensor, positions: list[list[int]] | None = None) -> None:
    own = chosen(layer, kept)
    for n, expected in enumerate(merged_values(layer, own, positions)):
        actual = layers.rows(values, kept)[n]
        # Values are below 8, weighted means of them no larger.
        tolerance = TOLERANCES[layer.v.dtype]
        torch.testing.assert_close(actual[: len(expected)].double(), expected, rtol=tolerance, atol=8 * 2e-6)
        assert not actual[len(expected) :].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("ragged", [False, True])
def test_evicted_values_join_their_neighbours(
    monkeypatch: pytest.MonkeyPatch, padding: str, heads: tuple[int, int], dtype: torch.dtype, ragged: bool
) -> None:
    monkeypatch.setattr(merge, "_BLOCK", 17)  # several blocks, the last one short
    layer = batch(padding, heads, dtype)
    base: Method = SnapKV(keep=0.3, window=8)
    base = AdaKV(base) if ragged else base
    _, kept, keys, values = run(Merge(base), layer)
    check_merged(layer, kept, values)
    _, plain, plain_keys, plain_values = run(base, layer)
    assert torch.equal(kept.indices, plain.indices)
    assert torch.equal(keys, plain_keys)
    assert not torch.equal(values, plain_values)


def test_two_neighbours_by_hand() -> None:
    """Columns 0 and 4 stay; 1 and 2 (equally near: the earlier) join 0; 3 and 5 join 4."""
    layer = layers.build(lengths=(6,), heads=1, kv_heads=1)
    k = torch.zeros(1, 1, 6, 8)
    k[0, 0, :, 0] = torch.tensor([1.0, 5, -1, 2, 2, 1])
    v = torch.eye(6, 8)[None, None]
    layer = replace(layer, k=k, v=v, ctx=replace(layer.ctx, scale=1.0))
    method = Merge(Given(torch.tensor([[[9.0, 0, 0, 0, 9, 0]]]), 2))
    _, _, _, values = run(method, layer)
    far = math.exp(-2)  # <k_2, k_0> - <k_0, k_0> = -2, and so for columns 5 and 4
    first = torch.tensor([1, 1, far, 0, 0, 0, 0, 0]) / (2 + far)  # column 1 would count e^4, but counts 1
    second = torch.tensor([0, 0, 0, 1, 1, far, 0, 0]) / (2 + far)
    torch.testing.assert_close(values[0, 0], torch.stack([first, second]), rtol=1e-6, atol=1e-7)


def test_nearest_goes_by_position() -> None:
    layer = layers.build(lengths=(30,))
    generator = torch.Generator().manual_seed(3)
    positions = torch.stack([torch.randperm(400, generator=generator)[:30].sort().values for _ in range(2)])[None]
    method = Merge(SnapKV(budget=9, window=2))
    _, kept, _, values = run(method, layer, positions=positions)
    check_merged(layer, kept, values, positions[0].tolist())
    assert not torch.equal(values, run(method, layer)[3])


def test_places_without_a_token_and_empty_heads_take_part_in_nothing() -> None:
    layer = layers.build(lengths=(9,), heads=4, kv_heads=2)
    method = Merge(Given(torch.rand(1, 2, 9), 4))
    ctx = layer.context(method)
    kept = Kept(torch.tensor([[[2, 5, -1, -1], [0, 1, 7, 8]]]))
    check_merged(layer, kept, method.compact(layer.k, layer.v, kept, ctx)[1])
    kept = Kept(torch.tensor([1, 2, 6]), torch.tensor([0, 0, 3], dtype=torch.int32))
    check_merged(layer, kept, method.compact(layer.k, layer.v, kept, ctx)[1])
    kept = Kept(torch.zeros(0, dtype=torch.int64), torch.tensor([0, 0, 0], dtype=torch.int32))
    assert method.compact(layer.k, layer.v, kept, ctx)[1].shape == (0, 8)
    everything = Kept(torch.arange(9).repeat(1, 2, 1))
    assert torch.equal(method.compact(layer.k, layer.v, everything, ctx)[1], layer.v)


# --- Decoding


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (Decoding(SnapKV(keep=0.5), 100, 8), {99: None, 107: None, 108: 100, 200: 100}),
        (Decoding(SnapKV(keep=0.5), 100), {163: None, 164: 100}),
        (Decoding(SnapKV(keep=0.5), keep=0.25, interval=1), {250: None, 251: 250, 400: 250}),
        (Decoding(SnapKV(keep=0.5), keep=0.2501), {314: None, 315: 251}),
        (SnapKV(keep=0.5), {1000: None}),
    ],
    ids=repr,
)
def test_a_cache_shrinks_once_it_has_grown_enough(method: Method, expected: dict[int, int | None]) -> None:
    assert {held: method.decode_budget(held, 1000) for held in expected} == expected
    assert method.traits.decodes == isinstance(method, Decoding)
    assert method.num_kept(1000, 0, 2) == 500
    assert Merge(method).decode_budget(1000, 1000) == method.decode_budget(1000, 1000)


# --- QueryAware


def question_scores(layer: Any, width: int, kernel: int) -> Tensor:
    """The attention of the last ``width`` queries to the columns before them, averaged over queries and neighbours."""
    q, k = layer.q.double(), layer.k.double()
    kv_heads, num_tokens = k.shape[1:3]
    group, context = q.shape[1] // kv_heads, num_tokens - width
    scores = torch.zeros(1, kv_heads, context, dtype=torch.float64)
    for h in range(q.shape[1]):
        for t in range(context, num_tokens):
            logits = layer.ctx.scale * (k[0, h // group, : t + 1] @ q[0, h, t])
            scores[0, h // group] += logits.softmax(0)[:context] / (width * group)
    reach = kernel // 2
    padded = torch.nn.functional.pad(scores, (reach, reach))
    return torch.stack([padded[..., i : i + kernel].sum(-1) / kernel for i in range(context)], -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("length", "window"), [(5, 64), (5, 5), (12, 8)])
def test_the_question_scores_and_protects_nothing_else(
    heads: tuple[int, int], dtype: torch.dtype, length: int, window: int
) -> None:
    layer = layers.build(heads=heads[0], kv_heads=heads[1], lengths=(60,), dtype=dtype)
    question = tuple(range(length))
    method = QueryAware(SnapKV(keep=0.5, window=window), question)
    assert method.scoring_passes(50) == [ScoringPass(prompt_ids=question)]
    assert method.protected == 0
    ctx = layer.context(method, scoring_pass=method.scoring_passes(50)[0])
    actual = method.score(layer.module, layer.q[:, :, -length:], layer.k, layer.v, ctx)
    width = min(length, window)
    expected = question_scores(layer, width, 5)[..., : 60 - length]
    tolerance = 2e-5 if dtype == torch.float32 else 2e-3  # logits of bf16 products, in fp32; the softmax's sums too
    torch.testing.assert_close(actual[..., : 60 - length].double(), expected, rtol=tolerance, atol=1e-7)
    # Any wrapper inside it is kept; the same in an eviction without the question is the method alone.
    within = QueryAware(ChunkKV(SnapKV(keep=0.5, window=window), 1), question)
    again = within.score(layer.module, layer.q[:, :, -length:], layer.k, layer.v, ctx)
    assert torch.equal(again[..., : 60 - length], actual[..., : 60 - length])
    alone = method.score(layer.module, layer.q, layer.k, layer.v, replace(ctx, scoring_pass=None))
    assert torch.equal(
        alone, method.method.score(layer.module, layer.q, layer.k, layer.v, replace(ctx, scoring_pass=None))
    )


# --- all of them


def compositions() -> list[Method]:
    base = SnapKV(keep=0.4, window=6)
    return [
        AdaKV(base),
        AdaKV(CriticalKV(base)),
        CriticalKV(AdaKV(base)),
        AdaKV(ChunkKV(base, 5)),
        PyramidKV(base),
        AdaKV(PyramidKV(base, 2)),
        PerLayer(base, (0.9, 0.3, 0.2, 0.2)),
        Rerotate(ChunkKV(base, 5)),
        Rerotate(CriticalKV(ChunkKV(base, 5))),
        Merge(AdaKV(base)),
        Merge(Rerotate(base)),
        Merge(Threshold(CriticalKV(base), 0.0)),
        Decoding(Merge(base), 20),
        AdaKV(QueryAware(base, (1, 2, 3))),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("method", compositions(), ids=repr)
def test_compositions_meet_their_budgets(
    method: Method, padding: str, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    layer = batch(padding, heads, dtype)
    scores, kept, keys, values = run(method, layer)
    assert scores.dtype == torch.float32
    own = chosen(layer, kept)
    mask = kept_mask(kept, *scores.shape)
    assert keys.shape == values.shape == (*kept.indices.shape, 8)
    assert keys.dtype == values.dtype == dtype
    assert keys.isfinite().all()
    assert values.isfinite().all()
    for b, real in enumerate(layer.real()):
        heads_of_b = own[b * heads[1] : (b + 1) * heads[1]]
        for g, row in enumerate(heads_of_b):
            assert row == sorted(set(row))
            assert mask[b, g].nonzero().flatten().tolist() == row
            assert set(row) <= set(real)
            assert set(real[-6:]) <= set(row)
        if method.traits.bounded:
            budget = layer.context(method).budgets[b]
            assert sum(map(len, heads_of_b)) == heads[1] * budget
            assert method.traits.ragged or {len(row) for row in heads_of_b} == {budget}


@pytest.mark.parametrize("method", compositions(), ids=repr)
def test_only_a_threshold_reads_the_device_back(method: Method) -> None:
    """Fake tensors have no data: whatever asks for some raises."""
    layer = layers.build()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        layer = replace(layer, **{name: mode.from_tensor(getattr(layer, name)) for name in ("q", "k", "v")})
        for changes in ({}, {"positions": mode.from_tensor(torch.arange(61).repeat(1, 2, 1))}):
            if "Threshold" in repr(method):
                with pytest.raises(DynamicOutputShapeException):
                    run(method, layer, **changes)
            else:
                _, kept, keys, _ = run(method, layer, **changes)
                assert keys.shape[:-1] == kept.indices.shape


def test_a_selection_becomes_a_mask() -> None:
    uniform = kept_mask(Kept(torch.tensor([[[0, 3, -1], [1, 2, 3]]])), 1, 2, 4)
    assert uniform.tolist() == [[[True, False, False, True], [False, True, True, True]]]
    # Heads 0 and 2 are empty; the last row belongs to no head.
    ragged = kept_mask(Kept(torch.tensor([1, 3, 0, 2]), torch.tensor([0, 0, 2, 2, 3], dtype=torch.int32)), 2, 2, 4)
    assert ragged.nonzero().tolist() == [[0, 1, 1], [0, 1, 3], [1, 1, 0]]
    assert kept_mask(Kept(torch.zeros(1, 2, 0, dtype=torch.int64)), 1, 2, 4).sum() == 0


def test_every_wrapper_is_listed_by_its_name() -> None:
    assert {name: wrapper.__name__ for name, wrapper in WRAPPERS.items()} == {
        "adakv": "AdaKV",
        "pyramidkv": "PyramidKV",
        "per_layer": "PerLayer",
        "chunkkv": "ChunkKV",
        "criticalkv": "CriticalKV",
        "rerotate": "Rerotate",
        "threshold": "Threshold",
        "merge": "Merge",
        "decoding": "Decoding",
        "query_aware": "QueryAware",
    }
    assert all(issubclass(wrapper, Wrapper) and wrapper.__doc__ for wrapper in WRAPPERS.values())
