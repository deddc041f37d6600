"""What the decoder answers once: the same as plain generation, kept on disk, and read by a run in its place."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import MistralForCausalLM

from condense_core.training import teacher
from condense_core.training.data import BatchMaker
from condense_core.training.losses import tail_logits
from condense_core.training.teacher import SHARD, Taught, own_answers, teach

Build = Callable[[int], MistralForCausalLM]

# fp32 sums in another order, through two layers; stored log-probabilities are float16, 2^-11 of values up to 10.
TOLERANCES = {"computed": {"atol": 1e-4, "rtol": 1e-4}, "stored": {"atol": 1e-2, "rtol": 2e-3}}
SHAPE = {"contexts": 40, "min_context": 96, "max_context": 110, "turns": 3}


@pytest.fixture
def everything_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random decoder never says an expected value; here whatever it says counts as right."""
    monkeypatch.setattr(teacher, "contained", lambda *_: 1.0)


@pytest.fixture
def model(build_model: Build) -> MistralForCausalLM:
    return build_model(3).requires_grad_(False).eval()


@pytest.fixture
def taught(everything_is_right: None, model: MistralForCausalLM, maker: BatchMaker, tmp_path: Path) -> Taught:
    return teach(model, maker, tmp_path, **SHAPE)


@pytest.mark.parametrize("stops", [False, True], ids=["full length", "an end among the tokens"])
def test_answers_are_those_of_plain_generation(model: MistralForCausalLM, maker: BatchMaker, stops: bool) -> None:
    """Questions of different lengths and numbers behind two contexts, each alone as it would be asked."""
    rng = random.Random(0)
    contexts = torch.tensor([maker.with_facts(rng, 40, 1).ids for _ in range(2)])
    questions = [
        maker.question_ids(["Who?", "What is the price of the old mill?"]),
        maker.question_ids(["Where was it?"]),
    ]
    ends: set[int] = set()
    if stops:
        first = own_answers(model, maker.prefix, contexts, questions, ends=set(), max_new_tokens=6)
        ends = {first[0][0][0][2], first[1][0][0][4]}
    found = own_answers(model, maker.prefix, contexts, questions, ends=ends, max_new_tokens=6, top=4)
    for context, asked, answers in zip(contexts.tolist(), questions, found, strict=True):
        for question, (ids, top) in zip(asked, answers, strict=True):
            prompt = maker.prefix.tolist() + context + question
            expected: list[int] = []
            for _ in range(6):
                logits = model(torch.tensor([prompt + expected])).logits[0, -1]
                best = logits.log_softmax(-1).topk(4)
                step = len(expected)
                torch.testing.assert_close(top.log_probs[step], best.values, **TOLERANCES["computed"])
                expected.append(int(best.indices[0]))
                if expected[-1] in ends:
                    break
            assert ids == expected
            assert top.ids[:, 0].tolist() == ids


def test_what_is_kept_is_what_it_said(taught: Taught, model: MistralForCausalLM) -> None:
    batch = taught.draw(random.Random(1), tokens=1000)
    assert batch.teacher is not None
    logits, ids = tail_logits(model, model.get_input_embeddings()(batch.context), batch)
    log_probs = F.log_softmax(logits.float(), -1)
    torch.testing.assert_close(log_probs.gather(1, batch.teacher.ids), batch.teacher.log_probs, **TOLERANCES["stored"])
    assert torch.equal(batch.teacher.ids[:, 0], ids)  # greedy


def test_joined_contexts_keep_their_conversations(taught: Taught) -> None:
    """Rows of several contexts, of which every conversation is one that stood behind one of them."""
    rng = random.Random(3)
    known = {}
    for shard in taught.shards:
        for row, context in enumerate(shard["context"].tolist()):
            for part in teacher._conversations(shard, row):
                key = tuple(context), tuple(part.tail.tolist())
                known[key] = part
    joined_before = set()
    for _ in range(20):
        batch = taught.draw(rng, 700, longest=400, turns=5)
        each = next(s["context"].shape[1] for s in taught.shards if batch.context.shape[1] % s["context"].shape[1] == 0)
        joined = batch.context.shape[1] // each
        joined_before.add(joined)
        assert joined * each <= 400
        assert batch.turns is not None
        assert batch.teacher is not None
        assert int(batch.turns.max()) < 5
        place = 0
        for row, context in enumerate(batch.context.tolist()):
            parts = [tuple(context[start : start + each]) for start in range(0, len(context), each)]
            assert len(set(parts)) == joined
            for turn in range(int(batch.turns[row].max()) + 1):
                own = batch.turns[row] == turn
                tail = tuple(batch.tail[row, own].tolist())
                part = next(known[part, tail] for part in parts if (part, tail) in known)
                assert torch.equal(batch.tail_mask[row, own], part.mask)
                rows = slice(place, place := place + int(part.mask.sum()))
                assert torch.equal(batch.teacher.ids[rows], part.top.ids)
                assert torch.equal(batch.teacher.log_probs[rows], part.top.log_probs)
        assert place == len(batch.teacher.ids) == int(batch.tail_mask.sum())
    assert joined_before == {1, 2, 3}


def test_rows_fill_the_budget_and_differ(taught: Taught) -> None:
    rng = random.Random(2)
    for tokens in (1, 500, 100_000):
        batch = taught.draw(rng, tokens)
        width = batch.context.shape[1] + batch.tail.shape[1]
        assert 1 <= len(batch.context) <= max(1, tokens // width + 1)
        assert len(batch.context) == len(set(map(tuple, batch.context.tolist())))
        assert batch.turns is not None
        assert ((batch.turns >= 0).sum(1) > 0).all()
    assert len(batch.context) == SHARD


def test_answered_once_it_is_read_and_a_run_cut_off_goes_on(
    everything_is_right: None,
    model: MistralForCausalLM,
    maker: BatchMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = teach(model, maker, tmp_path, **SHAPE)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["00000.safetensors", "00001.safetensors"]  # 40 contexts, 32 a file
    files[1].unlink()
    first = files[0].read_bytes()
    calls: list[int] = []
    ask = teacher.own_answers
    monkeypatch.setattr(teacher, "own_answers", lambda *a, **k: calls.append(1) or ask(*a, **k))
    again = teach(model, maker, tmp_path, **SHAPE)
    assert files[0].read_bytes() == first
    assert len(calls) == 2  # 32 contexts, 16 at once
    assert again.digest == whole.digest
    for ours, theirs in zip(again.shards, whole.shards, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_wrong_answers_are_left_out(model: MistralForCausalLM, maker: BatchMaker, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"teacher: .* none of the 64 contexts .* right"):
        teach(model, maker, tmp_path, **SHAPE)


@pytest.mark.parametrize("change", ["model", "seed", "turns", "file"])
def test_answers_of_another_run_are_refused(
    taught: Taught, build_model: Build, model: MistralForCausalLM, maker: BatchMaker, tmp_path: Path, change: str
) -> None:
    shape, message = dict(SHAPE), rf"00000.safetensors: the answers differ in {change}"
    if change == "model":
        model, message = build_model(4), "differ in model_digest"
    elif change == "seed":
        maker = BatchMaker(maker.store, maker.tokenizer, seed=maker.seed + 1)
    elif change == "turns":
        shape["turns"] = 2
    else:
        (tmp_path / "00000.safetensors").write_bytes(b"no tensors")
        message = "00000.safetensors: no answers of a teacher .*; remove it"
    with pytest.raises(ValueError, match=message):
        teach(model, maker, tmp_path, **shape)
