"""What ``select`` keeps: scores of tokens from attention and surprise, sentences, segments, exact counts."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from condense_core.compressor.encoder import Encoder
from condense_core.compressor.selection import Passage, Selector, cut, keep_sentences
from condense_core.tasks.architectures import FAMILIES

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

# fp32 through three layers of weights of order 0.2; softmax weights of up to 1, squared losses of up to some hundred.
TOLERANCES = {"atol": 1e-4, "rtol": 1e-3}

Build = Callable[..., PreTrainedModel]


def selector(model: PreTrainedModel, layers: int = 2, max_tokens: int = 512) -> Selector:
    return Selector(model, Encoder(model, layers), max_tokens)


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 120, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def passage(count: int, seed: int = 0, **fields: object) -> Passage:
    return Passage(tokens(count, seed), [i // 7 for i in range(count)], **fields)


@pytest.fixture(scope="module", params=["Llama", "Gemma2", "Qwen3", "GptOss"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    changes = {"attn_implementation": "eager"}  # the implementation that reports attention
    return next(f for f in FAMILIES if f.kind == request.param).build(**changes)


def attention(model: PreTrainedModel, before: list[int], ids: list[int], behind: list[int]) -> Tensor:
    """``[layers, n]``: the most that a token of ``ids`` gets from any head and any token of ``behind``."""
    output = model(input_ids=torch.tensor([before + ids + behind]), output_attentions=True)
    start = len(before)
    stop = start + len(ids)
    return torch.stack([layer[0, :, stop:, start:stop].amax((0, 1)) for layer in output.attentions])


@torch.no_grad()
def test_with_a_question_the_score_is_attention_less_that_of_the_neutral_one(model: PreTrainedModel) -> None:
    before, question, neutral = tokens(3, 1), tokens(5, 2), tokens(4, 3)
    asked = passage(30, before=before, question=question, neutral=neutral)
    (found,) = selector(model, 3, max_tokens=64).scores([asked])
    own, anyway = (attention(model, before, list(asked.ids), behind)[1:3] for behind in (question, neutral))
    torch.testing.assert_close(found, (own - anyway).clamp_min(0).mean(0), **TOLERANCES)


@torch.no_grad()
@pytest.mark.parametrize("marked", [True, False], ids=["names and numbers", "none known"])
def test_without_a_question_the_score_is_squared_loss_and_mark_in_units_of_their_means(
    model: PreTrainedModel, marked: bool
) -> None:
    before, marks = tokens(3, 1), [float(i % 3 == 0) for i in range(30)]
    given = passage(30, before=before, marks=marks if marked else ())
    (found,) = selector(model).scores([given])
    ids = torch.tensor([before + list(given.ids)])
    losses = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
    squares = losses[2:].square()
    expected = squares / squares.mean() + (3 * torch.tensor(marks) if marked else 0)
    torch.testing.assert_close(found, expected, **TOLERANCES)


def test_a_text_of_one_token_and_one_without_marks_have_finite_scores(build_model: Build) -> None:
    for count in (1, 2):
        for marks in ((), [0.0] * count):
            (found,) = selector(build_model()).scores([passage(count, marks=marks)])
            assert found.isfinite().all()


@torch.no_grad()
def test_passages_in_one_pack_score_as_alone(model: PreTrainedModel) -> None:
    """Several questions about one text among them, and texts with and without a question."""
    given = [
        passage(30, question=tokens(5, 2), neutral=tokens(4, 3)),
        passage(30, question=tokens(6, 4), neutral=tokens(4, 3)),
        passage(30),
        passage(11, seed=5, before=tokens(2, 1), question=tokens(5, 2)),
        passage(30, before=tokens(2, 1), question=tokens(5, 2)),
        passage(1, seed=6),
    ]
    one = selector(model)
    together = one.scores(given)
    for found, each in zip(together, given, strict=True):
        (alone,) = one.scores([each])
        torch.testing.assert_close(found, alone, **TOLERANCES)


def test_questions_about_one_text_read_it_once(build_model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    one, read = selector(build_model()), []
    original = one.encoder.read
    monkeypatch.setattr(
        one.encoder, "read", lambda embeds, packing: read.append(len(embeds)) or original(embeds, packing)
    )
    one.scores([passage(100, question=tokens(5, seed), neutral=tokens(4, 9)) for seed in range(10)])
    assert read == [100 + 10 * 5 + 4]


@torch.no_grad()
def test_a_long_text_is_read_in_segments_each_with_the_question_behind_it(build_model: Build) -> None:
    one = selector(build_model(), max_tokens=40)
    around = {"before": tokens(3, 1), "question": tokens(5, 2)}
    long = passage(75, **around)
    (found,) = one.scores([long])
    ends = cut(long.sentences, 40 - 8)
    assert len(ends) == 4
    parts = [
        one.scores([Passage(long.ids[a:b], [i // 7 for i in range(b - a)], **around)])[0] for a, b in pairwise(ends)
    ]
    torch.testing.assert_close(found, torch.cat(parts), **TOLERANCES)


def test_where_every_layer_has_a_window_a_segment_is_no_longer(build_model: Build) -> None:
    """Beyond the window a question sees nothing: read whole, the first sentences could never be kept."""
    asked = passage(90, question=tokens(5, 2))
    (found,) = selector(build_model(sliding_window=32)).scores([asked])
    assert (found > 0).all()
    assert selector(build_model(sliding_window=None)).max_asked_tokens == 512


def test_what_leaves_too_few_positions_for_a_text(build_model: Build) -> None:
    one = selector(build_model(), max_tokens=40)
    with pytest.raises(ValueError, match="question: 21 tokens with the prompt around it, expected at most 20, half"):
        one.scores([passage(9, question=tokens(21))])
    with pytest.raises(ValueError, match="prompt: 21 tokens, expected at most 20"):
        one.scores([passage(9, before=tokens(21))])
    one.scores([passage(9, question=tokens(20))])


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 30), max_size=20), room=st.integers(1, 60))
def test_segments_cover_a_text_and_are_cut_between_sentences_where_there_is_one(lengths: list[int], room: int) -> None:
    sentences = [i for i, length in enumerate(lengths) for _ in range(length)]
    ends = cut(sentences, room)
    assert ends[0] == 0
    assert ends[-1] == len(sentences)
    for a, b in pairwise(ends):
        assert 0 < b - a <= room
        inside = b < len(sentences) and sentences[b] == sentences[b - 1]
        assert not inside or sentences[b] == sentences[b - (b - a) // 4]


@given(data=st.data())
def test_whole_sentences_are_kept_by_mean_score_and_exactly_the_budget(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=12))
    sentences = [i for i, length in enumerate(lengths) for _ in range(length)]
    scores = data.draw(st.lists(st.integers(0, 50), min_size=len(sentences), max_size=len(sentences)))
    budget = data.draw(st.integers(1, len(sentences)))
    kept = keep_sentences(torch.tensor(scores, dtype=torch.float32), torch.tensor(sentences), budget).tolist()
    assert kept == sorted(set(kept))
    assert len(kept) == budget
    of = [[i for i, s in enumerate(sentences) if s == sentence] for sentence in range(len(lengths))]
    means = [sum(scores[i] for i in part) / len(part) for part in of]
    shares = [len(set(part) & set(kept)) for part in of]
    in_part = [s for s, part in enumerate(of) if 0 < shares[s] < len(part)]
    assert len(in_part) <= 1
    whole = [means[s] for s, part in enumerate(of) if shares[s] == len(part)]
    left = [means[s] for s, share in enumerate(shares) if not share]
    assert not left or not whole or min(whole) >= max(left) - 1e-9
    for s in in_part:  # its best run
        part, size = of[s], shares[s]
        run = sorted(set(part) & set(kept))
        assert run == list(range(run[0], run[0] + size))
        sums = [sum(scores[i] for i in part[a : a + size]) for a in range(len(part) - size + 1)]
        assert sum(scores[i] for i in run) == max(sums)


def test_the_earlier_of_equals_and_scores_that_are_no_numbers() -> None:
    sentences = torch.arange(20) // 4
    assert keep_sentences(torch.ones(20), sentences, 8).tolist() == list(range(8))
    assert keep_sentences(torch.full((20,), float("nan")), sentences, 6).tolist() == list(range(6))
