"""Texts tokenized first and compressed later, each with a ratio of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from condense_core.compressor.condenser import Condenser
from condense_core.compressor.tokenized import TokenizedText

TEXTS = [
    "The access code of Harrowgate is 4711. It was changed in spring, when the old gate was torn down.",
    "A keeper walks the wall at dusk, and counts the lamps. There are forty of them, and one is always dark.",
    "Short, but long enough to be halved.",
    "The river rises in March; by June one can wade through it. Nobody has drawn a map of it since the flood.",
]


def condenser_of(path: Path, method: str) -> Condenser:
    depth = 2 if method == "select" else 1
    return Condenser.from_pretrained(path, method=method, encoder_layers=depth)


@pytest.mark.parametrize("method", ["pool", "mean", "memory", "select"])
def test_texts_of_several_ratios_in_one_pack_are_what_each_is_alone(lively_path: Path, method: str) -> None:
    condenser = condenser_of(lively_path, method)
    ratios = [4, 2, 4, 3] if method != "select" else [4, 2.5, 1, 3]
    together = condenser.compress_tokenized(
        [condenser.tokenize(text, ratio) for text, ratio in zip(TEXTS, ratios, strict=True)]
    )
    for soft, text, ratio in zip(together, TEXTS, ratios, strict=True):
        alone = condenser.compress(text, ratio)
        assert (soft.ratio, soft.num_context_tokens, soft.text) == (alone.ratio, alone.num_context_tokens, alone.text)
        assert soft.context_sha256 == alone.context_sha256
        # fp32, other sizes of matrix products: sums in another order.
        torch.testing.assert_close(soft.embeds, alone.embeds, rtol=1e-4, atol=1e-5)


def test_questions_are_read_with_their_own_text(lively_path: Path) -> None:
    condenser = condenser_of(lively_path, "select")
    asked = ["What is the code?", None, None, "Who drew a map?"]
    made = [condenser.tokenize(text, 3, question=q) for text, q in zip(TEXTS, asked, strict=True)]
    together = condenser.compress_tokenized(made)
    alone = [condenser.compress(text, 3, question=q) for text, q in zip(TEXTS, asked, strict=True)]
    assert [soft.text for soft in together] == [soft.text for soft in alone]
    assert made[0].num_read > made[1].num_read > len(made[1].ids)  # with the question, the prompt around it


def test_a_number_of_soft_tokens_stands_for_a_ratio(lively_path: Path) -> None:
    select, pool = condenser_of(lively_path, "select"), condenser_of(lively_path, "pool")
    assert len(select.compress_tokenized([select.tokenize(TEXTS[0], max_soft_tokens=7)])[0]) == 7
    soft = pool.compress_tokenized([pool.tokenize(TEXTS[0], max_soft_tokens=7)])[0]
    assert len(soft) <= 7
    assert len(pool.compress(TEXTS[0], soft.ratio - 1)) > 7
    with pytest.raises(ValueError, match="max_soft_tokens: got a ratio too"):
        pool.tokenize(TEXTS[0], 4, max_soft_tokens=7)


def test_what_compress_refuses_is_refused_before_any_model_runs(lively_path: Path) -> None:
    condenser = condenser_of(lively_path, "pool")
    for bad, message in (
        ({"text": ""}, "text: empty"),
        ({"ratio": 0.5}, "ratio: got"),
        ({"question": "?"}, "question"),
    ):
        with pytest.raises(ValueError, match=message):
            condenser.tokenize(**{"text": TEXTS[0], "ratio": 4} | bad)  # type: ignore[arg-type]
    assert condenser.compress_tokenized([]) == []
    assert isinstance(condenser.tokenize(TEXTS[0]), TokenizedText)
