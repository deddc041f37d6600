"""What the decoder answers with the full context, asked once and kept on disk: the targets of distillation.

A bare value is a poor target, because a chat model would say a sentence: most of its loss is then about the wording,
which no context decides. So the decoder writes its own answers, and what it held likely at each of their tokens is kept
with them. A run reads them from there as often as it likes: a teacher that is asked anew for each batch takes two
fifths of the time of training.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from condense_core.decoder.architecture import decoder_parts
from condense_core.decoder.identity import model_digest
from condense_core.decoder.logits import decoder_logits
from condense_core.files.tensors import save_tensors
from condense_core.tasks.metrics import contained
from condense_core.training.data import Batch, BatchMaker, TopLogits
from condense_core.training.losses import turn_inputs

#: Contexts in a file, all of one length.
SHARD = 32
#: Tokens of an answer, and how many likely tokens are kept at each of them.
MAX_ANSWER, TOP = 28, 16
_FORMAT = 1
_AT_ONCE = 16  # contexts that are read together


class Taught:
    """Contexts, questions about them and the decoder's own answers, in a folder of ``SHARD`` contexts a file."""

    def __init__(self, shards: Sequence[dict[str, Tensor]], prefix: Tensor, digest: str) -> None:
        self.shards, self.prefix, self.digest = shards, prefix, digest
        self.useful = [(shard["turns"] >= 0).any(1).nonzero().squeeze(1).tolist() for shard in shards]
        if not any(self.useful):
            total = sum(len(shard["context"]) for shard in shards)
            raise ValueError(f"teacher: about none of the {total} contexts it answered a question right, expected some")

    def draw(self, rng: random.Random, tokens: int, longest: int = 0, turns: int | None = None) -> Batch:
        """Rows of contexts of one file, together about ``tokens`` tokens of contexts and tails, at least one row.

        Args:
            rng: decides which.
            tokens: of all rows.
            longest: tokens of a row's context, at most. Where several contexts have room, some rows are several of
                them, one behind the other: long ones that cost the decoder nothing, with answers that are more often
                right than those it would give about so long a text. A file's contexts are never cut.
            turns: questions about a row, at most; None: all.
        """
        shard, useful = rng.choice([pair for pair in zip(self.shards, self.useful, strict=True) if pair[1]])
        each = shard["context"].shape[1]
        length = math.exp(rng.uniform(math.log(each), math.log(max(each, longest))))
        joined = min(int(length / each + 1e-6), len(useful))
        width = joined * each + shard["tail"].shape[1]
        picked = rng.sample(useful, joined * min(len(useful) // joined, max(1, tokens // width)))
        rows = [picked[start : start + joined] for start in range(0, len(picked), joined)]
        asked = []
        for row in rows:
            parts = [part for index in row for part in _conversations(shard, index)]
            asked.append(parts if turns is None or len(parts) <= turns else rng.sample(parts, turns))
        tail, mask = (
            pad_sequence([torch.cat([getattr(part, name) for part in parts]) for parts in asked], batch_first=True)
            for name in ("tail", "mask")
        )
        numbers = [torch.cat([torch.full_like(part.tail, i) for i, part in enumerate(parts)]) for parts in asked]
        tops = [part.top for parts in asked for part in parts]
        top = TopLogits(torch.cat([t.ids for t in tops]), torch.cat([t.log_probs for t in tops]))
        context = shard["context"][picked].long().view(len(rows), -1)
        own = pad_sequence(numbers, batch_first=True, padding_value=-1)
        return Batch(self.prefix, context, tail, mask, "question", own, top)


class _Conversation(NamedTuple):
    """A question and its answer, ``tail`` and ``mask [T]``, and what was likely at each token of the answer."""

    tail: Tensor
    mask: Tensor
    top: TopLogits


def _conversations(shard: dict[str, Tensor], row: int) -> list[_Conversation]:
    """Those about one context of a file."""
    found, place = [], 0
    for turn in range(int(shard["turns"][row].max()) + 1):
        own = shard["turns"][row] == turn
        mask = shard["tail_mask"][row, own].bool()
        answer = slice(place, place := place + int(mask.sum()))
        top = TopLogits(shard["top_ids"][row, answer].long(), shard["top_log_probs"][row, answer].float())
        found.append(_Conversation(shard["tail"][row, own].long(), mask, top))
    return found


def teach(
    model: PreTrainedModel,
    maker: BatchMaker,
    folder: Path,
    *,
    contexts: int,
    min_context: int,
    max_context: int,
    turns: int,
    progress: Callable[[int, int], None] | None = None,
) -> Taught:
    """Have ``model`` answer questions about ``contexts`` contexts, or read what it answered before.

    Files that are there already are not made again, so a run that was cut off goes on. An answer that does not contain
    the expected value teaches nothing about contexts, and is left out with its question.

    Args:
        model: the decoder.
        maker: draws contexts and questions; file i is a function of its seed and i.
        folder: for the files; it is made where there is none.
        contexts: how many, rounded up to whole files.
        min_context, max_context: their lengths in tokens, drawn log-uniformly for each file.
        turns: questions about a context, at most.
        progress: called with (files, files in all).

    Raises:
        ValueError: the folder holds answers of another model, or to other questions; or none of the answers is right.
    """
    folder.mkdir(parents=True, exist_ok=True)
    identity = {
        "format": _FORMAT,
        "model_digest": model_digest(model),
        "corpus": maker.store.digest,
        "seed": maker.seed,
        "wording": maker.wording,
        "lengths": [min_context, max_context],
        "turns": turns,
    }
    count = -(-contexts // SHARD)
    shards = []
    for index in range(count):
        path = folder / f"{index:05d}.safetensors"
        if not path.exists():
            rng = random.Random(f"teacher-{maker.seed}-{index}")
            length = round(math.exp(rng.uniform(math.log(min_context), math.log(max_context))))
            part = path.with_suffix(".part")
            save_tensors(_shard(model, maker, rng, length, turns), part, {"identity": json.dumps(identity)})
            part.replace(path)
        shards.append(_read(path, identity))
        if progress:
            progress(index + 1, count)
    return Taught(shards, maker.prefix, json.dumps(identity, sort_keys=True))


def _read(path: Path, identity: dict[str, Any]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads(file.metadata()["identity"])
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no answers of a teacher ({' '.join(str(error).split())}); remove it") from error
    if differing := sorted(name for name in identity if found.get(name) != identity[name]):
        raise ValueError(f"{path}: the answers differ in {', '.join(differing)} from this run; expected another folder")
    return tensors


def _shard(model: PreTrainedModel, maker: BatchMaker, rng: random.Random, length: int, turns: int) -> dict[str, Tensor]:
    """The tensors of a file: ``SHARD`` contexts of ``length`` tokens, and the conversations about each."""
    rows, expected, asked = [], [], []
    for _ in range(SHARD):
        row = maker.with_facts(rng, length, min(turns, max(2, length // 40)))
        rows.append(row.ids)
        facts = rng.sample(row.facts, min(turns, len(row.facts)))
        asked.append(maker.question_ids([fact.question for fact in facts]))
        expected.append([fact.answer for fact in facts])
    conversations: list[list[tuple[list[int], list[int]]]] = []
    tops: list[list[TopLogits]] = []
    for start in range(0, SHARD, _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        written = own_answers(model, maker.prefix, torch.tensor(rows[some]), asked[some], ends=_ends(model))
        for questions, answers, wanted in zip(asked[some], written, expected[some], strict=True):
            texts = maker.tokenizer.batch_decode([ids for ids, _ in answers], skip_special_tokens=True)
            right = [i for i, text in enumerate(texts) if contained(text, wanted[i])]
            conversations.append([(questions[i], answers[i][0]) for i in right])
            tops.append([answers[i][1] for i in right])
    batch = maker.conversations("question", rows, conversations)
    assert batch.turns is not None
    most = max(1, int(batch.tail_mask.sum(1).max()))
    ids = torch.zeros(SHARD, most, TOP, dtype=torch.int32)
    log_probs = torch.zeros(SHARD, most, TOP, dtype=torch.float16)
    for i, found in enumerate(tops):
        place = 0
        for top in found:
            taken = slice(place, place := place + len(top.ids))
            ids[i, taken], log_probs[i, taken] = top.ids.int(), top.log_probs.half()
    return {
        "context": batch.context.int(),
        "tail": batch.tail.int(),
        "tail_mask": batch.tail_mask.to(torch.uint8),
        "turns": batch.turns.to(torch.int16),
        "top_ids": ids,
        "top_log_probs": log_probs,
    }


def _ends(model: PreTrainedModel) -> set[int]:
    """Tokens that end an answer."""
    config = getattr(model, "generation_config", None)
    end = getattr(config, "eos_token_id", None)
    return set(end) if isinstance(end, list) else {int(end)} if end is not None else set()


@torch.no_grad()
def own_answers(
    model: PreTrainedModel,
    prefix: Tensor,
    contexts: Tensor,
    questions: Sequence[Sequence[list[int]]],
    *,
    ends: set[int],
    max_new_tokens: int = MAX_ANSWER,
    top: int = TOP,
) -> list[list[tuple[list[int], TopLogits]]]:
    """Greedy answers to several questions about each context, and what was likely at each of their tokens.

    A context is read once, and its questions stand behind it without seeing each other; a step of decoding is one
    token of every answer.

    Args:
        model: the decoder.
        prefix: token ids ``[P]`` before each context. contexts: ``[B, C]``.
        questions: for each context, token ids from its end to where the answer begins.
        ends: tokens that end an answer; they are part of it.
        max_new_tokens: of an answer, at most.
        top: how many likely tokens are kept.

    Returns:
        For each context and question the token ids of the answer, and ``[A, top]`` of its A tokens.
    """
    inner = decoder_parts(model)
    device = inner.embed_tokens.weight.device
    rows, most = len(contexts), max(map(len, questions))
    width = max(sum(map(len, asked)) for asked in questions)
    tail = torch.zeros(rows, width, dtype=torch.long)
    turns = torch.full((rows, width), -1)
    last = torch.zeros(rows, most, dtype=torch.long)  # of each question, its last place in the tail
    lengths = torch.zeros(rows, most, dtype=torch.long)
    for row, asked in enumerate(questions):
        place = 0
        for turn, question in enumerate(asked):
            size = len(question)
            tail[row, place : place + size], turns[row, place : place + size] = torch.tensor(question), turn
            place += size
            last[row, turn], lengths[row, turn] = place - 1, size
    start = len(prefix) + contexts.shape[1]
    ids = torch.cat([prefix.expand(rows, -1), contexts, tail], 1).to(device)
    turns, dtype = turns.to(device), inner.embed_tokens.weight.dtype
    cache = DynamicCache(config=model.config)
    inputs = turn_inputs(turns, start, dtype)
    hidden = inner(input_ids=ids, past_key_values=cache, use_cache=True, **inputs).last_hidden_state
    reached = hidden[torch.arange(rows)[:, None], (start + last).to(device)]
    # What a token of answer q sees: prefix, context and question q, then the tokens of its own answer.
    own = turns[:, None, :] == torch.arange(most, device=device)[:, None]
    seen = torch.cat([torch.ones(rows, most, start, dtype=torch.bool, device=device), own], 2)
    same = torch.eye(most, dtype=torch.bool, device=device).expand(rows, -1, -1)
    given: list[tuple[Tensor, Tensor, Tensor]] = []
    done = torch.tensor([[i >= len(asked) for i in range(most)] for asked in questions], device=device)
    for step in range(max_new_tokens):
        log_probs, likely = decoder_logits(model, reached).float().log_softmax(-1).topk(top, -1)
        given.append((likely, log_probs, ~done))
        token = likely[..., 0]
        done = done | torch.isin(token, torch.tensor(sorted(ends), device=device))
        if bool(done.all()) or step == max_new_tokens - 1:
            break
        seen = torch.cat([seen, same], 2)
        mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)
        positions = (start + step + lengths).to(device)
        reached = inner(
            input_ids=token,
            past_key_values=cache,
            use_cache=True,
            position_ids=positions,
            attention_mask=mask.unsqueeze(1),
        ).last_hidden_state
    return [[_answer(given, row, turn) for turn in range(len(asked))] for row, asked in enumerate(questions)]


def _answer(given: list[tuple[Tensor, Tensor, Tensor]], row: int, turn: int) -> tuple[list[int], TopLogits]:
    """The tokens of an answer until it ended, and what was likely at each."""
    steps = [(ids[row, turn], probs[row, turn]) for ids, probs, open_ in given if bool(open_[row, turn])]
    ids, log_probs = torch.stack([i for i, _ in steps]).cpu(), torch.stack([p for _, p in steps]).cpu()
    return ids[:, 0].tolist(), TopLogits(ids, log_probs)
