"""Requests and answers from hostile bytes: what is taken, and what is refused with which words."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
import torch

from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.neurons.protocol.messages import Ask, MessageError, most_ask_bytes, read_answer, read_ask
from condense_core.neurons.tiers import read_tiers
from condense_testing.fuzzed_answers import fuzz_answers

TIERS = read_tiers()
TEXT = "The keeper counts the lamps. " * 40  # 1,160 characters
GOOD: dict[str, Any] = {"version": 1, "tier": "research", "text": TEXT, "ratio": 4.0, "question": None}
WIDTH, TOKENS = 8, 290


def body(**changes: Any) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


@pytest.mark.parametrize("question", [None, "Who counts?"])
def test_a_request_comes_back_as_it_was_written(question: str | None) -> None:
    ask = Ask(tier="research", text=TEXT, ratio=2.5, question=question)
    read, tier = read_ask(ask.to_bytes(), TIERS)
    assert read == ask
    assert tier is TIERS.tiers["research"]


@pytest.mark.parametrize(
    ("sent", "words", "code"),
    [
        (b"", "body: Invalid JSON", "invalid_request"),
        (b"[1]", "body: ", "invalid_request"),
        (b"\xff" * 10, "body: Invalid JSON", "invalid_request"),
        (b"[" * 20_000, "body: ", "invalid_request"),
        (body(version=2), "version: ", "invalid_request"),
        (body(version="1"), "version: ", "invalid_request"),
        (body(tier="gold"), "tier: got 'gold', expected one of inference_0, inference_1, research", "unknown_tier"),
        (body(tier="../etc"), "tier: ", "invalid_request"),
        (body(text=7), "text: ", "invalid_request"),
        (body(text="short"), "text: 5 characters, expected 1,000 to 2,500 in tier 'research'", "invalid_request"),
        (body(text="x" * 2501), "text: 2,501 characters, expected 1,000 to 2,500", "too_large"),
        (body(ratio="4"), "ratio: ", "invalid_request"),
        (body(ratio=float("nan")), "ratio: ", "invalid_request"),
        (body(ratio=True), "ratio: ", "invalid_request"),
        (body(ratio=32.0), "ratio: got 32, expected 2 to 16", "invalid_request"),
        (body(question=""), "question: ", "invalid_request"),
        (body(question="?" * 501), "question: 501 characters, expected at most 500", "too_large"),
        (body(url="http://x"), "url: Extra inputs are not permitted", "invalid_request"),
    ],
)
def test_what_is_no_request_is_refused(sent: bytes, words: str, code: str) -> None:
    with pytest.raises(MessageError) as caught:
        read_ask(sent, TIERS)
    assert str(caught.value).startswith(words)
    assert caught.value.code == code
    assert "keeper" not in str(caught.value)  # contents are not repeated


def test_the_longest_request_of_all_tiers_is_within_the_bound_and_more_is_not_parsed() -> None:
    longest = Ask(tier="inference_1", text="\U0001f600" * 7000, ratio=4.0, question="\U0001f600" * 500)
    escaped = json.dumps(longest.model_dump()).encode()
    assert read_ask(escaped, TIERS)[0] == longest
    with pytest.raises(MessageError, match=r"body: .* bytes, expected at most"):
        read_ask(b" " * (most_ask_bytes(TIERS) + 1), TIERS)


# -- answers -----------------------------------------------------------------------------------------------------------

ASK = Ask(tier="research", text=TEXT, ratio=4.0)


def soft(rows: int = 73, width: int = WIDTH, **changes: Any) -> SoftTokens:
    fields: dict[str, Any] = {
        "embeds": torch.ones(rows, width),
        "num_context_tokens": TOKENS,
        "ratio": 4,
        "model_id": "m/one",
        "context_sha256": hashlib.sha256(TEXT.encode()).hexdigest(),
    }
    return SoftTokens(**{**fields, **changes})


def answered(sent: bytes) -> SoftTokens:
    tier = TIERS.tiers["research"]
    known = {"model_id": "m/one", "model_digest": "1" * 64, "width": WIDTH}
    return read_answer(sent, ASK, tier, context_tokens=TOKENS, **known)


@pytest.mark.parametrize(("rows", "ratio"), [(73, 4), (58, 5), (1, 290)])
def test_an_answer_of_the_ratio_or_a_higher_one_is_taken(rows: int, ratio: float) -> None:
    assert len(answered(soft(rows, ratio=ratio).to_bytes())) == rows


def test_what_is_no_answer_is_refused() -> None:
    good = soft().to_bytes()
    flipped = bytearray(good)
    flipped[-1] ^= 1
    for sent, words in [
        (b"", "answer: "),
        (good[:-1], "answer: "),
        (good + b"\0", "answer: "),
        (bytes(flipped), "answer: "),
        (b"\x80\x04K\x01.", "answer: "),  # a pickle
        (b"\xff" * 8 + b"{}", "answer: "),
        (soft(97, ratio=3).to_bytes(), "answer: 97 soft tokens for 290 tokens, a ratio of 3, expected at least 4"),
        (soft(width=9).to_bytes(), "answer: soft tokens are 9 wide, expected 8"),
        (soft(model_id="m/two").to_bytes(), "answer: soft tokens were made"),
        (soft(model_digest="0" * 64).to_bytes(), "answer: soft tokens were made by a model 'm/one' with other weights"),
        (soft(context_sha256="0" * 64).to_bytes(), "answer: soft tokens of another context"),
        (soft(225, num_context_tokens=900).to_bytes(), "answer: it says that the context has 900 tokens, expected 290"),
    ]:
        with pytest.raises(MessageError) as caught:
            answered(sent)
        assert str(caught.value).startswith(words), caught.value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_answer_that_is_not_finite_is_refused(value: float) -> None:
    bad = torch.ones(73, WIDTH)
    bad[40, 3] = value
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SoftTokens, "check_finite", lambda self: None)
        sent = soft(embeds=bad).to_bytes()
    with pytest.raises(MessageError, match="answer: embeds has NaN or infinite values in 1 of 73 soft tokens"):
        answered(sent)


@pytest.mark.parametrize("value", [65504.0, -65504.0])
def test_values_are_numbers_to_a_model_of_any_dtype(value: float) -> None:
    rows = torch.ones(73, WIDTH)
    rows[40, 3] = value
    assert torch.equal(answered(soft(embeds=rows).to_bytes()).embeds, rows)
    rows[40, 3] *= 1.001
    with pytest.raises(MessageError, match=r"answer: a value of 6\.56e\+04, expected at most 65,504"):
        answered(soft(embeds=rows).to_bytes())


def test_an_answer_of_too_many_bytes_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    tier = TIERS.tiers["research"].model_copy(update={"max_answer_bytes": 100})
    monkeypatch.setattr(SoftTokens, "from_bytes", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(MessageError, match="answer: 101 bytes, expected at most 100"):
        read_answer(b"x" * 101, ASK, tier, context_tokens=TOKENS, model_id="m/one", width=WIDTH)


def test_no_answer_that_is_nearly_right_is_taken_for_what_it_is_not() -> None:
    found = fuzz_answers(1000)
    assert found["refused"] > 800
    assert found["taken"] > 5  # some of the changes change nothing
