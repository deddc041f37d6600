"""Every scoring method against its oracle: heads, padding, dtypes, passes over chunks, short sequences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from condense_core.pruning import methods
from condense_core.pruning.base import ScoringPass
from condense_core.pruning.methods import METHODS, common
from condense_testing.pruning.method_cases import (
    ALL,
    HEADS_AND_DTYPES,
    INF,
    TOKENS,
    Case,
    check,
    instances,
    last_pass,
    make_case,
)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize(("heads", "dtype"), HEADS_AND_DTYPES)
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
    monkeypatch.setattr(common, "BLOCK_ELEMENTS", {"cpu": 2 * 8 * TOKENS * 3})  # three queries at a time
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
