"""Every scoring method against its oracle: heads, padding, dtypes, passes over chunks, short sequences, bad input."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pruning_oracles as oracles
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from transformers import MistralConfig
from transformers.models.mistral.modeling_mistral import (
    MistralAttention,
    MistralRotaryEmbedding,
    apply_rotary_pos_emb,
)

from condense_core.pruning import methods
from condense_core.pruning.base import LayerContext, ScoringMethod, ScoringPass
from condense_core.pruning.methods import METHODS, common
from condense_core.pruning.methods.qfilter import calibrate, load_filters, save_filters
from condense_core.pruning.rotary import Rotary

INF = math.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Many heads in groups of four, as Mistral has them, and few.
HEADS = [(32, 8), (8, 2)]
HEAD_DIM, TOKENS, LAYER, LAYERS = 16, 83, 1, 3

# The oracles compute in float64 from the same rounded tensors; the methods in float32, from 16-bit tensors too. Logits
# of order 10 carry 1e-6, which exp makes a relative error; sums and z-scores of some hundred terms carry a few more.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}
# query_moments documents its own rounding for 16-bit queries: cov[i, j] is off by up to 2u sqrt(cov[i, i] cov[j, j]),
# u = 2^-9 for bfloat16, in logits of order 1 here, which enter the score through exp; 2e-4 was seen.
EXPECTED_TOLERANCE = {torch.bfloat16: {"rtol": 1e-3, "atol": 2e-6}, torch.float16: {"rtol": 1e-3, "atol": 2e-6}}


def instances(kv_heads: int) -> dict[str, ScoringMethod]:
    """Every method with settings that matter at 83 tokens, and its variants."""
    filters = torch.randn(LAYERS, kv_heads, HEAD_DIM, generator=torch.Generator().manual_seed(5))
    m = methods
    return {
        "random": m.Random(keep=0.5, seed=2**40 + 3),
        "streaming_llm": m.StreamingLLM(keep=0.5, sink=3),
        "knorm": m.Knorm(keep=0.5),
        "keydiff": m.KeyDiff(keep=0.5),
        "qfilter": m.QFilter(keep=0.5, filters=filters),
        "lagkv": m.LagKV(keep=0.7, sink=3, lag=16),
        "lagkv/short": m.LagKV(keep=0.5),
        "snapkv": m.SnapKV(keep=0.5, window=8),
        "tova": m.TOVA(keep=0.5),
        "finch": m.Finch(keep=0.5, window=7),
        "finch/plain": m.Finch(keep=0.5, window=7, normalize_scores=False),
        "observed_attention": m.ObservedAttention(keep=0.5),
        "expected_attention": m.ExpectedAttention(keep=0.5, future=64),
        "expected_attention/mean": m.ExpectedAttention(keep=0.5, sink=0, epsilon=0.01, use_covariance=False),
        "expected_attention/attention": m.ExpectedAttention(keep=0.5, future=1, use_vnorm=False),
        "leverage": m.LeverageScore(keep=0.5, sketch=8, seed=3),
        "leverage/wide": m.LeverageScore(keep=0.5),
        "non_causal": m.NonCausal(keep=0.5, chunk=16),
        "non_causal/scaled": m.NonCausal(keep=0.5, scale=0.25),
        "compactor": m.Compactor(keep=0.7, chunk=16, sketch=8),
        "compactor/budget": m.Compactor(budget=30, sink=0, window=0),
        "compactor/blend": m.Compactor(keep=0.5, blending=2.0, sink=2, window=9, chunk=16),
    }


ALL = list(instances(2))


@dataclass
class Case:
    """A batch as a method gets it, and where the real columns of each sequence are."""

    q: Tensor
    k: Tensor
    v: Tensor
    ctx: LayerContext
    places: list[tuple[int, int]]

    def sequence(self, b: int) -> Any:
        """Sequence b alone, in float64."""
        start, stop = self.places[b]
        past = self.k.shape[2] - self.q.shape[2]
        rows = slice(max(start - past, 0), max(stop - past, 0))
        tables = [t[b if len(t) > 1 else 0, rows].double() for t in (self.ctx.cos, self.ctx.sin)]
        if self.ctx.positions is not None:
            positions = self.ctx.positions[b, :, start:stop]
        else:
            positions = torch.arange(stop - start).repeat(self.k.shape[1], 1)
        previous = None if self.ctx.previous is None else self.ctx.previous[b, :, start:stop].double()
        return oracles.OneSequence(
            self.q[b, :, rows].double(),
            self.k[b, :, start:stop].double(),
            self.v[b, :, start:stop].double(),
            *tables,
            positions,
            previous,
            self.ctx.scale,
            self.ctx.rotary.inv_freq.double(),
            self.ctx.rotary.factor,
            LAYER,
            self.ctx.budgets[b],
        )

    def expected(self, method: ScoringMethod, *args: int) -> Tensor:
        """The oracle's scores of the batch, -inf for padding."""
        scores = torch.full(self.k.shape[:3], -INF, dtype=torch.float64)
        for b, (start, stop) in enumerate(self.places):
            scores[b, :, start:stop] = getattr(oracles, method.name)(self.sequence(b), method, *args)
        return scores


def attention_module(heads: int, kv_heads: int, dtype: torch.dtype) -> tuple[Any, Any]:
    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=48,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_DIM,
        num_hidden_layers=LAYERS,
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        attn_implementation="sdpa",
    )
    return MistralAttention(config, LAYER).to(dtype).eval(), MistralRotaryEmbedding(config)


@torch.no_grad()
def make_case(
    heads: int = 8,
    kv_heads: int = 2,
    *,
    padding: str = "none",
    dtype: torch.dtype = torch.float32,
    tokens: int = TOKENS,
    lengths: tuple[int, ...] | None = None,
) -> Case:
    """Two sequences behind a layer of Mistral; what stands at padding is NaN: reading it shows."""
    lengths = lengths or ((tokens, tokens) if padding == "none" else (tokens - 21, tokens))
    starts = [tokens - n if padding == "left" else 0 for n in lengths]
    places = [(start, start + n) for start, n in zip(starts, lengths, strict=True)]
    module, embedding = attention_module(heads, kv_heads, dtype)
    hidden = (4 * torch.randn(len(lengths), tokens, 48)).to(dtype)
    positions = (torch.arange(tokens) - torch.tensor(starts)[:, None]).clamp(min=0)
    cos, sin = embedding(hidden, positions)
    q, k, v = (
        projection(hidden).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    column = torch.arange(tokens)
    outside = torch.stack([(column < start) | (column >= stop) for start, stop in places])[:, None, :, None]
    q, k, v = (x.masked_fill(outside, math.nan) for x in (q, k, v))
    ctx = LayerContext(
        module=module,
        layer_idx=LAYER,
        num_layers=LAYERS,
        budgets=tuple(max(1, n // 2) for n in lengths),
        lengths=tuple(lengths),
        bounds=None if padding == "none" else torch.tensor(places),
        scale=HEAD_DIM**-0.5,
        rotary=Rotary(embedding.inv_freq.float()),
        cos=cos,
        sin=sin,
        hidden=hidden,
    )
    return Case(q, k, v, ctx, places)


def last_pass(case: Case, queries: int, *, evicted: bool) -> Case:
    """The same batch when all but the last ``queries`` columns were read earlier; evicted: half of them are gone."""
    columns = case.k.shape[2]
    past = columns - queries
    generator = torch.Generator().manual_seed(9)
    previous = torch.rand(*case.k.shape[:2], past, generator=generator)
    ctx = replace(case.ctx, cos=case.ctx.cos[:, -queries:], sin=case.ctx.sin[:, -queries:], previous=previous)
    q = case.q[:, :, -queries:]
    if not evicted:
        return Case(q, case.k, case.v, ctx, case.places)
    assert case.ctx.bounds is None
    kept = torch.rand(*case.k.shape[:2], past, generator=generator).argsort(-1)[..., : past // 2].sort().values
    positions = torch.cat([kept, torch.arange(past, columns).expand(*kept.shape[:2], -1)], -1)
    k, v = (x.gather(2, positions[..., None].expand(-1, -1, -1, HEAD_DIM)) for x in (case.k, case.v))
    held = positions.shape[2]
    ctx = replace(ctx, positions=positions, previous=previous.gather(2, kept), lengths=(held,) * len(k))
    return Case(q, k, v, ctx, [(0, held)] * len(k))


def check(method: ScoringMethod, case: Case, *args: int) -> None:
    """Scores within the tolerance, and a selection that the oracle's scores allow."""
    scores = method.score(case.ctx.module, case.q, case.k, case.v, case.ctx)
    expected = case.expected(method, *args)
    tolerance = TOLERANCE
    if method.name == "expected_attention" and case.k.dtype in EXPECTED_TOLERANCE:
        tolerance = EXPECTED_TOLERANCE[case.k.dtype]
    assert scores.dtype == torch.float32
    if method.name == "lagkv":
        check_ranks(scores, expected, method.lag)
    else:
        torch.testing.assert_close(scores.double(), expected, **tolerance)
        check_selection(method, scores, expected, case, tolerance)


def check_ranks(scores: Tensor, expected: Tensor, lag: int) -> None:
    """LagKV's scores are ranks: two tokens whose worth is one rounding apart may trade theirs, nothing more."""
    assert torch.equal(scores.isinf(), expected.isinf())
    assert (scores[scores.isinf()] == expected[expected.isinf()]).all()
    finite = expected.isfinite()
    difference = (scores.double() - expected)[finite].abs()
    assert difference.max() <= 1.001 / lag if difference.numel() else True
    assert (difference > 1e-6).double().mean() < 0.02 if difference.numel() else True


def check_selection(
    method: ScoringMethod, scores: Tensor, expected: Tensor, case: Case, tolerance: dict[str, float]
) -> None:
    kept = method.select(scores, case.ctx)
    batch, heads = scores.shape[:2]
    for b in range(batch):
        for g in range(heads):
            if kept.cu_seqlens is None:
                own = kept.indices[b, g]
            else:
                first, last = kept.cu_seqlens[b * heads + g : b * heads + g + 2].tolist()
                own = kept.indices[first:last]
            budget = min(case.ctx.budgets[b], case.places[b][1] - case.places[b][0])
            assert len(own.unique()) == len(own) == budget
            least = expected[b, g].topk(budget).values[-1]
            slack = tolerance["atol"] + 2 * tolerance["rtol"] * abs(least) if least.isfinite() else 0
            assert (expected[b, g, own] >= least - slack).all(), f"sequence {b}, head {g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", ALL)
def test_scores(name: str, heads: tuple[int, int], padding: str, dtype: torch.dtype) -> None:
    check(instances(heads[1])[name], make_case(*heads, padding=padding, dtype=dtype))


@pytest.mark.parametrize("evicted", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_last_of_several_passes(name: str, evicted: bool) -> None:
    check(instances(2)[name], last_pass(make_case(), 29, evicted=evicted))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", ALL)
def test_last_of_several_passes_with_padding(name: str, padding: str) -> None:
    """On the right the shorter sequence has 29 of the 50 queries; on the left it began before them.

    More than there are channels: the leverages of fewer tokens are all 1, and z-scores of roundings say nothing.
    """
    check(instances(2)[name], last_pass(make_case(padding=padding), 50, evicted=False))


@pytest.mark.parametrize("name", ALL)
def test_sequence_that_begins_in_the_last_pass(name: str) -> None:
    case = make_case(padding="left", lengths=(34, TOKENS))
    check(instances(2)[name], last_pass(case, 40, evicted=False))


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("name", ALL)
def test_shorter_than_every_window(name: str, padding: str) -> None:
    lengths = (3, 3) if padding == "none" else (1, 3)
    case = make_case(tokens=3, padding=padding, lengths=lengths)
    method = instances(2)[name]
    scores = method.score(None, case.q, case.k, case.v, case.ctx)
    assert not scores.isnan().any()
    for b, (start, stop) in enumerate(case.places):
        assert (scores[b, :, start:stop] > -INF).all()
        assert (scores[b, :, :start] == -INF).all()
        assert (scores[b, :, stop:] == -INF).all()
        always = method.sink if method.name == "lagkv" else method.protected  # type: ignore[attr-defined]
        assert ((scores[b] == INF).sum(-1) == min(always, stop - start)).all()


@pytest.mark.parametrize("name", ["expected_attention", "expected_attention/mean", "leverage", "compactor"])
def test_factor_of_the_rotary_embedding(name: str) -> None:
    """YaRN's cos and sin carry a factor, which queries and keys then have, and their rotation back must lose."""
    case, factor = make_case(), 1.25
    rotary = replace(case.ctx.rotary, factor=factor)
    ctx = replace(case.ctx, rotary=rotary, cos=case.ctx.cos * factor, sin=case.ctx.sin * factor)
    check(instances(2)[name], Case(case.q * factor, case.k * factor, case.v, ctx, case.places))


@pytest.mark.parametrize("passes", ["one", "several"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", [*ALL, "kvzip"])
def test_nothing_is_read_back_from_the_device(name: str, padding: str, passes: str) -> None:
    """Tensors without contents go through: no decision waits for a number."""
    case = make_case(padding=padding)
    case = case if passes == "one" else last_pass(case, 29, evicted=False)
    ctx, method = case.ctx, METHODS["kvzip"](keep=0.5) if name == "kvzip" else instances(2)[name]
    if name == "kvzip":
        ctx = replace(ctx, scoring_pass=ScoringPass((), 0, 20))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        empty = {key: mode.from_tensor(value) for key, value in vars(ctx).items() if isinstance(value, Tensor)} | {
            "rotary": replace(ctx.rotary, inv_freq=mode.from_tensor(ctx.rotary.inv_freq))
        }
        q, k, v = (mode.from_tensor(x) for x in (case.q, case.k, case.v))
        scores = method.score(None, q, k, v, replace(ctx, **empty))
    assert scores.shape == k.shape[:3]
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("name", ["finch", "observed_attention"])
def test_blocks_of_queries_add_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, method = make_case(padding="left"), instances(2)[name]
    whole = method.score(None, case.q, case.k, case.v, case.ctx)
    monkeypatch.setattr(common, "BLOCK_ELEMENTS", 2 * 8 * TOKENS * 3)  # three queries at a time
    torch.testing.assert_close(method.score(None, case.q, case.k, case.v, case.ctx), whole, rtol=1e-5, atol=1e-7)


def test_observed_attention_of_two_passes_is_that_of_one() -> None:
    method, case = methods.ObservedAttention(keep=0.5), make_case()
    whole = method.score(None, case.q, case.k, case.v, case.ctx)
    first = 31
    start = replace(case.ctx, cos=case.ctx.cos[:, :first], sin=case.ctx.sin[:, :first])
    previous = method.score(None, case.q[:, :, :first], case.k[:, :, :first], case.v[:, :, :first], start)
    rest = replace(case.ctx, cos=case.ctx.cos[:, first:], sin=case.ctx.sin[:, first:], previous=previous)
    joined = method.score(None, case.q[:, :, first:], case.k, case.v, rest)
    torch.testing.assert_close(joined, whole, rtol=1e-5, atol=1e-7)


def test_earlier_windows_of_compactor_become_average() -> None:
    method = instances(2)["compactor"]
    case = last_pass(make_case(), 29, evicted=False)
    assert case.ctx.previous is not None
    case.ctx.previous[:, :, -4:] = INF
    check(method, case)
    scores = method.score(None, case.q, case.k, case.v, case.ctx)
    assert (scores[:, :, -33:-29] == 0).all()


@pytest.mark.parametrize("name", ["leverage", "non_causal", "compactor"])
def test_methods_that_score_once_need_the_earlier_scores(name: str) -> None:
    case = last_pass(make_case(), 29, evicted=False)
    with pytest.raises(ValueError, match=r"ctx.previous is None, expected the scores of the 54 columns"):
        instances(2)[name].score(None, case.q, case.k, case.v, replace(case.ctx, previous=None))


# --- Random


def test_random_is_its_own_generator() -> None:
    case, method = make_case(), methods.Random(keep=0.5)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    scores = method.score(None, case.q, case.k, case.v, case.ctx)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(method.score(None, case.q, case.k, case.v, case.ctx), scores)
    others = (
        methods.Random(keep=0.5, seed=1).score(None, case.q, case.k, case.v, case.ctx),
        method.score(None, case.q, case.k, case.v, replace(case.ctx, layer_idx=2)),
        scores.flip(1),
    )
    for other in others:
        # Of 32 bits, 24 are compared: equal ones are rare.
        assert (other == scores).double().mean() < 0.01
    left = make_case(padding="left")
    padded = method.score(None, left.q, left.k, left.v, left.ctx)
    start, stop = left.places[0]
    assert torch.equal(padded[0, :, start:], scores[0, :, : stop - start])


def test_random_is_uniform() -> None:
    k = torch.zeros(1, 8, 20_000, 2)
    scores = methods.Random(keep=0.5).score(None, k, k, k, make_case().ctx)
    # 160,000 draws: the mean is within 5 of its standard deviations of 1/2, and so is each tenth's count.
    assert abs(float(scores.mean()) - 0.5) < 5 / math.sqrt(12 * scores.numel())
    counts = scores.histc(10, 0, 1)
    assert (counts - scores.numel() / 10).abs().max() < 5 * math.sqrt(scores.numel() * 0.09)
    # Neither neighbours nor heads go together.
    for a, b in ((scores[..., 1:], scores[..., :-1]), (scores[:, 1:], scores[:, :-1])):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(float(correlation)) < 5 / math.sqrt(a.numel())


# --- KVzip


def in_scoring_pass(padding: str, dtype: torch.dtype, start: int, stop: int, prompt: int = 5) -> tuple[Case, int]:
    """The last columns repeat tokens ``start`` to ``stop`` of a context of 50, behind a prompt."""
    queries = prompt + stop - start
    total = 50 + queries
    case = make_case(
        padding=padding, dtype=dtype, tokens=total, lengths=None if padding == "none" else (total - 13, total)
    )
    ctx = replace(
        case.ctx,
        cos=case.ctx.cos[:, -queries:],
        sin=case.ctx.sin[:, -queries:],
        scoring_pass=ScoringPass((7,) * prompt, start, stop),
    )
    return Case(case.q[:, :, -queries:], case.k, case.v, ctx, case.places), queries


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("part", [(0, 20), (20, 37)])
def test_kvzip(part: tuple[int, int], padding: str, dtype: torch.dtype) -> None:
    case, _ = in_scoring_pass(padding, dtype, *part)
    check(methods.KVzip(keep=0.5, sink=3), case, *part)


def test_kvzip_of_a_right_padded_context() -> None:
    """The appended tokens stand behind the padding: it is real, though ``bounds`` ends before."""
    case, queries = in_scoring_pass("none", torch.float32, 0, 20)
    context = case.k.shape[2] - queries
    case.ctx = replace(
        case.ctx, bounds=torch.tensor([[0, context - 11], [0, context]]), lengths=(context - 11, context)
    )
    for x in (case.k, case.v):
        x[0, :, context - 11 : context] = math.nan
    method = methods.KVzip(keep=0.5, sink=3)
    scores = method.score(None, case.q, case.k, case.v, case.ctx)
    short = case.sequence(0)
    keep = [*range(context - 11), *range(context, case.k.shape[2])]
    short = replace(short, q=case.q[0].double(), k=case.k[0, :, keep].double(), v=case.v[0, :, keep].double())
    expected = oracles.kvzip(short, method, 0, 20)
    torch.testing.assert_close(scores[0, :, : context - 11].double(), expected[:, : context - 11], **TOLERANCE)
    assert (scores[0, :, context - 11 :] == -INF).all()


def test_kvzip_reads_everything_again_once() -> None:
    method = methods.KVzip(keep=0.5, prompt_ids=(3, 1), chunk=10)
    assert method.scoring_passes(23) == [
        ScoringPass((3, 1), 0, 10),
        ScoringPass((3, 1), 10, 20),
        ScoringPass((3, 1), 20, 23),
    ]
    assert method.scoring_passes(0) == []


def test_kvzip_scores_in_a_scoring_pass_only() -> None:
    case = make_case()
    with pytest.raises(ValueError, match=r"KVzip: ctx.scoring_pass is None, expected one of scoring_passes"):
        methods.KVzip(keep=0.5).score(None, case.q, case.k, case.v, case.ctx)


# --- QFilter


def test_filters_point_away_from_the_queries() -> None:
    """A key along the queries scores higher than one against them; the direction is that of an SVD."""
    case = make_case(8, 2)
    queries = case.q + 3.0
    filters = calibrate([queries] * LAYERS, 2)
    expected = torch.zeros(2, HEAD_DIM)
    for h in range(8):
        x = torch.cat([queries[0, h], queries[1, h]])
        direction = torch.linalg.svd(x, full_matrices=False).Vh[0]
        expected[h // 4] -= direction * (x @ direction).mean().sign() / 4
    torch.testing.assert_close(filters, expected.expand(LAYERS, -1, -1), rtol=1e-4, atol=1e-4)
    along = queries.mean((0, 2)).unflatten(0, (2, -1)).mean(1)  # [G, D]
    k = torch.stack([along, -along], 1).unsqueeze(0)
    scores = methods.QFilter(keep=0.5, filters=filters).score(None, queries, k, k, case.ctx)
    assert (scores[..., 0] > 0).all()
    assert (scores[..., 1] < 0).all()


def test_filters_are_stored_as_safetensors(tmp_path: Path) -> None:
    filters = torch.randn(LAYERS, 2, HEAD_DIM)
    save_filters(filters, tmp_path / "filters.safetensors")
    assert torch.equal(load_filters(tmp_path / "filters.safetensors"), filters)
    stored = methods.QFilter(keep=0.5, filters=tmp_path / "filters.safetensors")
    given = methods.QFilter(keep=0.5, filters=filters)
    assert stored == given
    assert hash(stored) == hash(given)
    assert given != methods.QFilter(keep=0.5, filters=filters + 1)
    assert repr(given) == f"QFilter(keep=0.5, filters=[{LAYERS}, 2, {HEAD_DIM}])"


@pytest.mark.parametrize(
    ("filters", "error", "message"),
    [
        (None, TypeError, r"QFilter: filters is NoneType, expected a float tensor"),
        (torch.zeros(1, 2, 16, dtype=torch.int64), TypeError, r"QFilter: filters is torch.int64, expected a float"),
        (torch.zeros(2, 16), ValueError, r"QFilter: filters has shape \[2, 16\], expected \[L, G, D\]"),
        ("nowhere.safetensors", ValueError, r"QFilter: filters is 'nowhere.safetensors', expected the path"),
    ],
)
def test_bad_filters(filters: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        methods.QFilter(keep=0.5, filters=filters)


def test_filters_are_never_unpickled(tmp_path: Path) -> None:
    torch.save({"q_filters": torch.zeros(3, 2, 16)}, tmp_path / "filters.pt")
    with pytest.raises(ValueError, match="which is no safetensors file"):
        load_filters(tmp_path / "filters.pt")


def test_filters_of_another_model() -> None:
    case = make_case()
    method = methods.QFilter(keep=0.5, filters=torch.zeros(LAYERS, 4, HEAD_DIM))
    with pytest.raises(ValueError, match=r"filters has shape \[3, 4, 16\], expected \[L, G, D\] = \[3, 2, 16\]"):
        method.score(None, case.q, case.k, case.v, case.ctx)


@pytest.mark.parametrize(
    ("queries", "kv_heads", "error", "message"),
    [
        (torch.zeros(2, 8, 5, 16), 2, TypeError, "queries is Tensor, expected a sequence"),
        ([], 2, TypeError, "queries is list, expected a sequence"),
        ([torch.zeros(5, 16)], 2, ValueError, r"queries\[0\] is \[5, 16\], expected a tensor \[H, T, D\]"),
        ([torch.zeros(8, 0, 16)], 2, ValueError, r"queries\[0\] is \[8, 0, 16\], expected a tensor"),
        ([torch.zeros(8, 5, 16)], 3, ValueError, r"num_kv_heads is 3, expected a divisor of queries\[0\]'s 8 heads"),
    ],
)
def test_calibrate_refuses(queries: Any, kv_heads: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        calibrate(queries, kv_heads)


# --- the contract


def test_every_method_is_listed_and_tested() -> None:
    tested = {name.split("/")[0] for name in ALL} | {"kvzip"}
    assert set(METHODS) == tested
    assert all(METHODS[name].name == name for name in METHODS)
    assert all(getattr(methods, method.__name__) is method for method in METHODS.values())


@pytest.mark.parametrize("name", ALL)
def test_methods_are_values(name: str) -> None:
    method, again = instances(2)[name], instances(2)[name]
    assert method == again
    assert hash(method) == hash(again)
    with pytest.raises(AttributeError):
        method.keep = 0.1  # type: ignore[misc]


PROTECTED = {
    "random": 0,
    "streaming_llm": 3,
    "knorm": 0,
    "keydiff": 0,
    "qfilter": 0,
    "lagkv": 19,
    "lagkv/short": 132,
    "snapkv": 8,
    "tova": 1,
    "finch": 7,
    "finch/plain": 7,
    "observed_attention": 0,
    "expected_attention": 4,
    "expected_attention/mean": 0,
    "expected_attention/attention": 4,
    "leverage": 0,
    "leverage/wide": 0,
    "non_causal": 0,
    "non_causal/scaled": 0,
    "compactor": 12,
    "compactor/budget": 0,
    "compactor/blend": 11,
}


@pytest.mark.parametrize("name", ALL)
def test_protected(name: str) -> None:
    method = instances(2)[name]
    assert method.protected == PROTECTED[name]
    case = make_case()
    scores = method.score(None, case.q, case.k, case.v, case.ctx)
    forced = (scores == INF).sum(-1)
    if name == "lagkv":  # 80 tokens after the sinks are 5 full chunks: nothing follows the last
        assert (forced == 19).all()
    elif name == "lagkv/short":  # nothing to compare: the sinks alone
        assert (forced == 4).all()
    else:
        assert (forced == method.protected).all()


@pytest.mark.parametrize(
    ("kind", "settings", "error", "message"),
    [
        ("random", {"seed": -1}, ValueError, "Random: seed is -1, expected an int >= 0"),
        ("random", {"seed": 0.5}, TypeError, "Random: seed is 0.5, expected an int >= 0"),
        ("streaming_llm", {"sink": -1}, ValueError, "StreamingLLM: sink is -1, expected an int >= 0"),
        ("lagkv", {"lag": 0}, ValueError, "LagKV: lag is 0, expected an int >= 1"),
        ("lagkv", {"sink": True}, TypeError, "LagKV: sink is True, expected an int >= 0"),
        ("snapkv", {"window": 0}, ValueError, "SnapKV: window is 0, expected an int >= 1"),
        ("snapkv", {"kernel_size": 4}, ValueError, "SnapKV: kernel_size is 4, expected an odd int"),
        ("finch", {"window": 0}, ValueError, "Finch: window is 0, expected an int >= 1"),
        ("expected_attention", {"sink": -1}, ValueError, "ExpectedAttention: sink is -1, expected an int >= 0"),
        ("expected_attention", {"future": 0}, ValueError, "ExpectedAttention: future is 0, expected an int >= 1"),
        ("expected_attention", {"epsilon": -1.0}, ValueError, "epsilon is -1.0, expected a finite number >= 0"),
        ("expected_attention", {"epsilon": math.nan}, ValueError, "epsilon is nan, expected a finite number >= 0"),
        ("expected_attention", {"epsilon": "1"}, TypeError, "epsilon is '1', expected a number >= 0"),
        ("leverage", {"sketch": 0}, ValueError, "LeverageScore: sketch is 0, expected an int >= 1"),
        ("leverage", {"seed": None}, TypeError, "LeverageScore: seed is None, expected an int >= 0"),
        ("non_causal", {"chunk": 0}, ValueError, "NonCausal: chunk is 0, expected an int >= 1"),
        ("non_causal", {"scale": 0}, ValueError, "NonCausal: scale is 0, expected a finite number > 0"),
        ("non_causal", {"scale": None}, TypeError, "NonCausal: scale is None, expected a number > 0"),
        ("compactor", {"window": -1}, ValueError, "Compactor: window is -1, expected an int >= 0"),
        ("compactor", {"sketch": 0}, ValueError, "Compactor: sketch is 0, expected an int >= 1"),
        ("compactor", {"blending": -1}, ValueError, "Compactor: blending is -1, expected a finite number > 0"),
        ("kvzip", {"prompt_ids": [1]}, TypeError, r"KVzip: prompt_ids is \[1\], expected a tuple of token ids"),
        ("kvzip", {"prompt_ids": (1, -2)}, ValueError, r"KVzip: prompt_ids\[1\] is -2, expected an int >= 0"),
        ("kvzip", {"chunk": 0}, ValueError, "KVzip: chunk is 0, expected an int >= 1"),
    ],
)
def test_bad_settings(kind: str, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        METHODS[kind](keep=0.5, **settings)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "qfilter"])
@pytest.mark.parametrize(
    ("budget", "error"),
    [
        ({}, ValueError),
        ({"keep": 0.5, "budget": 3}, ValueError),
        ({"keep": 1.5}, ValueError),
        ({"budget": 0}, ValueError),
    ],
)
def test_bad_budgets(name: str, budget: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=METHODS[name].__name__):
        METHODS[name](**budget)
