"""Ragged layers do what the model's own attention does with softcaps, sinks and windows, or say that they do not.

The reference is the model itself: where nothing is evicted, a ragged cache gives its logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from condense_core.pruning import AdaKV, Knorm, PrunedCache, SnapKV, Threshold, prune
from condense_core.pruning.extras import Extras, capped_attention, check_evicted

Build = Callable[..., PreTrainedModel]

ALL = Threshold(SnapKV(keep=0.9), threshold=-1e9)
CAPPED = {
    "softcap": ("Gemma2", {}),
    "softcap and a sliding window": ("Gemma2", {"sliding_window": 20}),
    "sinks": ("GptOss", {}),
    "sinks and a sliding window": ("GptOss", {"sliding_window": 20}),
}
# Relative to logits of about 5, fp32 sums in another order.
TOLERANCE = 1e-4


def tokens(batch: int, count: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 128, (batch, count), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=CAPPED)
def capped(request: pytest.FixtureRequest, family_model: Build) -> PreTrainedModel:
    family, changes = CAPPED[request.param]
    return family_model(family, attn_implementation="eager", **changes)


@torch.no_grad()
@pytest.mark.parametrize("steps", [(5,), (1, 1, 1), (3, 1, 4, 1)], ids=str)
def test_a_ragged_cache_of_everything_answers_as_the_model(capped: PreTrainedModel, steps: tuple[int, ...]) -> None:
    """Questions of several tokens go head by head, single tokens through padded heads."""
    ids, question = tokens(1, 60), tokens(1, sum(steps), seed=2)
    expected = capped(torch.cat([ids, question], 1)).logits[:, 60:]
    cache, found = PrunedCache.prefill(capped, ids, ALL), []
    with cache.attached(capped):
        for part in question.split(steps, 1):
            found.append(capped(**cache.inputs(part)).logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=TOLERANCE, rtol=TOLERANCE)


@torch.no_grad()
def test_a_padded_batch_answers_as_each_text_alone(capped: PreTrainedModel) -> None:
    ids, question, method = tokens(2, 60), tokens(1, 5, seed=2), SnapKV(keep=0.5, window=8)
    alone = PrunedCache.prefill(capped, ids[:1, 20:], method)
    with alone.attached(capped):
        expected = [capped(**alone.inputs(part)).logits for part in question.split((4, 1), 1)]
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    both = PrunedCache.prefill(capped, ids, method, attention_mask=mask)
    with both.attached(capped):
        for part, logits in zip(question.split((4, 1), 1), expected, strict=True):
            found = capped(**both.inputs(part.expand(2, -1))).logits[:1]
            torch.testing.assert_close(found, logits, atol=TOLERANCE, rtol=TOLERANCE)


@torch.no_grad()
def test_generating_behind_a_ragged_cache_crops_and_repeats(capped: PreTrainedModel) -> None:
    """The longest head is counted once: it is still right after a crop and for repeated sequences."""
    ids, question = tokens(1, 60), tokens(1, 3, seed=2)
    cache = PrunedCache.prefill(capped, ids, AdaKV(SnapKV(keep=0.5, window=8)))
    with cache.attached(capped):
        first = [capped(**cache.inputs(part)).logits for part in question.split(1, 1)]
        cache.rewind()
        cache.batch_repeat_interleave(2)
        again = [capped(**cache.inputs(part.expand(2, -1))).logits for part in question.split(1, 1)]
    for one, two in zip(first, again, strict=True):
        torch.testing.assert_close(two, one.expand_as(two), atol=TOLERANCE, rtol=TOLERANCE)


def test_capped_attention_is_its_formula() -> None:
    """A float64 loop: softmax over c tanh(s q k / c) and the sink, whose weight goes to no value."""
    torch.manual_seed(0)
    q, k, v, sinks = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.randn(2)
    seen = torch.ones(3, 5, dtype=torch.bool).tril(2)
    found = capped_attention(q, k, v, seen, Extras(0.4, softcap=1.5), sinks[:, None, None])
    for h in range(2):
        for i in range(3):
            logits = [1.5 * math.tanh(0.4 * float(q[h, i].double() @ k[h, j].double()) / 1.5) for j in range(i + 3)]
            total = sum(map(math.exp, logits)) + math.exp(float(sinks[h]))
            expected = sum(math.exp(x) / total * v[h, j].double() for j, x in enumerate(logits))
            torch.testing.assert_close(found[h, i].double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("argument", "value", "said"),
    [
        ("position_bias", torch.zeros(1), "position_bias"),
        ("block_indices", torch.zeros(1), "block_indices"),
        ("temperature", 0.5, "temperature"),
        ("dropout", 0.1, "dropout=0.1"),
        ("is_causal", False, "is_causal=False"),
    ],
)
def test_what_ragged_layers_cannot_honour_is_refused_by_name(argument: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=rf"Linear asks for {said}, which .*; supported: dropout, is_causal, s_aux"):
        Extras.of(nn.Linear(2, 2), {"scaling": 1.0, argument: value})


def test_what_says_nothing_of_attention_is_passed_over() -> None:
    given = {"scaling": 0.5, "sliding_window": 7, "softcap": None, "position_bias": None, "dropout": 0.0}
    given |= {"position_ids": torch.zeros(1), "use_cache": True, "output_attentions": False, "is_causal": True}
    assert Extras.of(nn.Linear(2, 2), given) == Extras(0.5, sliding_window=7)


@pytest.mark.parametrize("name", ["position_bias", "indices", "block_indices"])
def test_arguments_by_column_are_refused_where_tokens_were_evicted(name: str) -> None:
    check_evicted(nn.Linear(2, 2), {name: None})
    with pytest.raises(ValueError, match=f"Linear gives {name}, which counts tokens by their place"):
        check_evicted(nn.Linear(2, 2), {name: torch.zeros(1)})


@torch.no_grad()
@pytest.mark.parametrize("kwargs", [{}, {"sink": 2, "window": 0}], ids=["nothing forced", "sinks"])
def test_threshold_keeps_a_token_in_every_head(family_model: Build, kwargs: dict[str, int]) -> None:
    """The one with the highest score, of every sequence of a padded batch too."""
    model, ids = family_model("Llama"), tokens(2, 40)
    method = Threshold(Knorm(keep=0.5), threshold=1e9, **({"sink": 0, "window": 0} | kwargs))
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    for given in (None, mask):
        cache = PrunedCache.prefill(model, ids, method, attention_mask=given)
        assert {int(n) for layer in cache.layers for n in layer.lengths} == {kwargs.get("sink", 1)}
        with cache.attached(model):
            assert model(**cache.inputs(ids[:, :5])).logits.isfinite().all()
    with prune(model, method):
        out = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert out.shape[1] <= 43
