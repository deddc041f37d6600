"""The answers to all questions about one context, and what the expected answers cost, from one reading of the context.

The prompts of these questions begin alike: with the template, and the context as text, as soft tokens or as a cache.
That is read once; the questions are then answered, and the expected answers scored, as one batch behind it
(``pruning.branches``). Where a model does not allow this (other attention functions, sliding windows shorter than the
prompt), every prompt is read whole.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache

from condense_core.compressor.condenser import Condenser, Context
from condense_core.decoder.architecture import decoder_parts
from condense_core.decoder.generation import check_room, generation_options
from condense_core.decoder.logits import dense_head_input
from condense_core.decoder.prompt import TemplateArgs, render
from condense_core.pruning.branches import Branches, WindowTooShort
from condense_core.pruning.cache import PrunedCache
from condense_core.pruning.text import answer_loss as answer_loss_behind
from condense_core.pruning.text import ask, question_ids
from condense_core.tasks.generators import Turn

#: Bytes of the attention weights of one layer that a batch of questions may take.
_MAX_WEIGHTS = 256 * 2**20


@dataclass(frozen=True)
class Answers:
    """What a model said to the questions about one context.

    Attributes:
        texts: its answers.
        losses: of the expected answers, in nats per token.
        ms: milliseconds of a question: to answer all of them, over their number. Reading what they share is part of it,
            unless that was a cache; scoring is not.
    """

    texts: list[str]
    losses: list[float]
    ms: float


def answers_about(condenser: Condenser, context: Context, turns: Sequence[Turn], max_new_tokens: int) -> Answers:
    """Answers to ``turns`` from a text, soft tokens or nothing (``""``): greedy, of at most ``max_new_tokens``."""
    model = condenser.model
    started = time.perf_counter()
    try:
        shared, questions = _split(
            [condenser.prompt_parts(context, t.question, max_new_tokens=max_new_tokens) for t in turns]
        )
        branches = _branches_behind(model, condenser.embed_parts(shared))
        texts = _generated(branches, condenser.tokenizer, questions, max_new_tokens)
    except (NotShared, WindowTooShort):
        return answers_from_each(condenser, [context] * len(turns), turns, max_new_tokens)
    _synchronize(model)
    ms = (time.perf_counter() - started) * 1e3 / len(turns)
    answers = [answer_ids(condenser.tokenizer, t.question, t.answer, condenser.template_args) for t in turns]
    return Answers(texts, _scored(branches, questions, answers), ms)


def answers_from_cache(condenser: Condenser, cache: PrunedCache, turns: Sequence[Turn], max_new_tokens: int) -> Answers:
    """Answers to ``turns`` from what ``cache`` holds of their context; it is not changed."""
    model, tokenizer, args = condenser.model, condenser.tokenizer, condenser.template_args
    started = time.perf_counter()
    questions = [question_ids(tokenizer, turn.question, args) for turn in turns]
    answers = [answer_ids(tokenizer, turn.question, turn.answer, args) for turn in turns]
    for question in questions:
        count = cache.get_seq_length() + len(question)
        check_room(model, count, max_new_tokens, "question: {} with the context before it", "expected a shorter one")
    try:
        branches = _branches(model, cache)
        texts = _generated(branches, tokenizer, questions, max_new_tokens)
    except (NotShared, WindowTooShort):
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "template_args": args}
        texts = [ask(model, tokenizer, cache, turn.question, **settings) for turn in turns]
        ms = (time.perf_counter() - started) * 1e3 / len(turns)
        pairs = zip(questions, answers, strict=True)
        return Answers(texts, [answer_loss_behind(model, cache, question, answer) for question, answer in pairs], ms)
    _synchronize(model)
    ms = (time.perf_counter() - started) * 1e3 / len(turns)
    return Answers(texts, _scored(branches, questions, answers), ms)


def answers_from_each(
    condenser: Condenser, contexts: Sequence[Context], turns: Sequence[Turn], max_new_tokens: int
) -> Answers:
    """As ``answers_about``, where each question has a context of its own: every prompt is read whole."""
    questions = [turn.question for turn in turns]
    started = time.perf_counter()
    texts = condenser.generate(list(contexts), questions, max_new_tokens=max_new_tokens)
    ms = (time.perf_counter() - started) * 1e3 / len(turns)
    losses = [answer_loss(condenser, c, turn.question, turn.answer) for c, turn in zip(contexts, turns, strict=True)]
    return Answers(list(texts), losses, ms)


@torch.no_grad()
def answers_from_caches(
    condenser: Condenser, caches: Sequence[PrunedCache], turns: Sequence[Turn], max_new_tokens: int
) -> Answers:
    """Answers to each of ``turns`` from a cache of its own, in one batch; the caches are not changed."""
    model, tokenizer, args = condenser.model, condenser.tokenizer, condenser.template_args
    started = time.perf_counter()
    settings = generation_options(tokenizer, max_new_tokens, {}, cached=True)
    batch = PrunedCache.stacked(caches)
    device = decoder_parts(model).embed_tokens.weight.device
    questions = [question_ids(tokenizer, turn.question, args) for turn in turns]
    ids, mask = _left_padded(questions, device)
    count = batch.get_seq_length() + ids.shape[1]
    check_room(model, count, max_new_tokens, "question: {} with the context before it", "expected a shorter one")
    with batch.attached(model), dense_head_input(model):
        tokens = model.generate(**batch.inputs(ids, mask), **settings)
    texts = [text.strip() for text in tokenizer.batch_decode(tokens[:, ids.shape[1] :], skip_special_tokens=True)]
    _synchronize(model)
    ms = (time.perf_counter() - started) * 1e3 / len(turns)
    answers = [answer_ids(tokenizer, turn.question, turn.answer, args) for turn in turns]
    batch = PrunedCache.stacked(caches)
    ids, mask = _left_padded([[*q, *a] for q, a in zip(questions, answers, strict=True)], device)
    kept = max(map(len, answers)) + 1
    with batch.attached(model), dense_head_input(model):
        logits = model(**batch.inputs(ids, mask), logits_to_keep=kept).logits.float()
    losses = [
        float(F.cross_entropy(logits[row, -len(answer) - 1 : -1], ids[row, -len(answer) :]))
        for row, answer in enumerate(answers)
    ]
    return Answers(texts, losses, ms)


class NotShared(Exception):
    """The questions cannot be asked as a batch behind what they share."""


# -- what prompts share ------------------------------------------------------------------------------------------------

Parts = list[list[int] | Tensor]


def _split(prompts: Sequence[Parts]) -> tuple[Parts, list[list[int]]]:
    """What all ``prompts`` begin with, and the token ids behind it, at least one of each prompt.

    ``NotShared`` where some have soft tokens behind what they share.
    """
    first, *others = prompts
    shared: Parts = []
    place, count = 0, 0  # the first part that is not shared whole, and how many of its tokens are
    for place, part in enumerate(first):
        count = min((_common(part, other[place]) if place < len(other) else 0 for other in others), default=len(part))
        if count < len(part) or any(len(other[place]) > count for other in others):
            break
        shared.append(part)
    else:  # prompts that are all the same
        shared.pop()
        count = len(first[place])
    tails = [prompt[place:] for prompt in prompts]
    if any(len(tail) != 1 or isinstance(tail[0], Tensor) for tail in tails):
        raise NotShared
    rest: list[list[int]] = [list(tail[0]) for tail in tails]
    if not all(rest):
        raise NotShared
    count = min(count, *(len(ids) - 1 for ids in rest))
    return [*shared, rest[0][:count]], [ids[count:] for ids in rest]


def _common(one: list[int] | Tensor, other: list[int] | Tensor) -> int:
    """How many tokens two parts begin with in common; soft tokens as a whole or none."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        both = isinstance(one, Tensor) and isinstance(other, Tensor)
        return len(one) if both and torch.equal(torch.as_tensor(one), torch.as_tensor(other)) else 0
    differing = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))


@torch.no_grad()
def _branches_behind(model: PreTrainedModel, embeds: Tensor) -> Branches:
    """Behind ``embeds [P, d]``, which are read here; P may be 0."""
    branches = _branches(model, None)
    if not len(embeds):
        return branches
    cache = DynamicCache()
    decoder_parts(model)(inputs_embeds=embeds[None], past_key_values=cache, use_cache=True)
    return _branches(model, cache)


def _branches(model: PreTrainedModel, cache: Cache | None) -> Branches:
    """``NotShared`` where the model, or what its generation looks at, does not allow branches."""
    config = model.generation_config
    looks_back = (getattr(config, "repetition_penalty", None) or 1.0) != 1.0 or getattr(
        config, "no_repeat_ngram_size", None
    )
    if looks_back:  # at the tokens of the prompt, which are other ones here
        raise NotShared
    try:
        return Branches(model, cache)
    except (TypeError, ValueError) as error:
        raise NotShared from error


def _batches(branches: Branches, rows: Sequence[Sequence[int]], num_new: int) -> Iterator[list[int]]:
    """Indices of ``rows``, as many at once as their attention weights may take; ``num_new``: tokens that follow."""
    width = max(map(len, rows))
    heads = int(branches.config.num_attention_heads)
    each = 3 * 4 * heads * width * (branches.past + width + num_new)
    size = max(1, _MAX_WEIGHTS // each)
    yield from (list(range(i, min(i + size, len(rows)))) for i in range(0, len(rows), size))


def _left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask, ``[B, longest]``; padding is token 0."""
    width = max(map(len, rows))
    ids = [[0] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


@torch.no_grad()
def _generated(
    branches: Branches, tokenizer: PreTrainedTokenizerBase, questions: Sequence[list[int]], max_new_tokens: int
) -> list[str]:
    model, settings = branches.model, generation_options(tokenizer, max_new_tokens, {}, cached=True)
    texts: list[str] = []
    for batch in _batches(branches, questions, max_new_tokens):
        ids, mask = _left_padded([questions[i] for i in batch], branches.inner.embed_tokens.weight.device)
        with branches, dense_head_input(model):
            tokens = model.generate(**branches.inputs(ids, mask), **settings)
        texts += tokenizer.batch_decode(tokens[:, ids.shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


@torch.no_grad()
def _scored(branches: Branches, questions: Sequence[list[int]], answers: Sequence[list[int]]) -> list[float]:
    """Mean negative log-likelihood of each answer behind its question, in nats per token."""
    rows = [[*question, *answer] for question, answer in zip(questions, answers, strict=True)]
    losses: list[float] = []
    for batch in _batches(branches, rows, 0):
        ids, mask = _left_padded([rows[i] for i in batch], branches.inner.embed_tokens.weight.device)
        kept = max(len(answers[i]) for i in batch) + 1
        with branches, dense_head_input(branches.model):
            logits = branches.model(**branches.inputs(ids, mask), logits_to_keep=kept).logits
        for row, i in enumerate(batch):
            count = len(answers[i])
            losses.append(float(F.cross_entropy(logits[row, -count - 1 : -1].float(), ids[row, -count:])))
    return losses


def _synchronize(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


# -- a single answer ---------------------------------------------------------------------------------------------------


@torch.inference_mode()
def answer_loss(condenser: Condenser, context: Context | Sequence[Context], prompt: str, answer: str) -> float:
    """Mean negative log-likelihood of ``answer`` (and the end of the turn) behind the prompt, in nats per token."""
    prefix = condenser.prepare(context, prompt)["inputs_embeds"]
    ids = torch.tensor([answer_ids(condenser.tokenizer, prompt, answer, condenser.template_args)], device=prefix.device)
    embeds = torch.cat([prefix, condenser.model.get_input_embeddings()(ids)], 1)
    logits = condenser.model(inputs_embeds=embeds, use_cache=False, logits_to_keep=ids.shape[1] + 1).logits
    return float(F.cross_entropy(logits[0, :-1].float(), ids[0]))


def answer_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, template_args: TemplateArgs | None = None
) -> list[int]:
    """Token ids of ``answer`` as the chat template writes an assistant's turn behind ``prompt``."""
    before = render(tokenizer, prompt, template_args)
    written = f"{answer}{tokenizer.eos_token or ''}"  # behind the line break that ends a prompt without template
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        whole = str(tokenizer.apply_chat_template(chat, tokenize=False))
        if whole.startswith(before):
            written = whole.removeprefix(before)
    ids: list[int] = tokenizer(written, add_special_tokens=False)["input_ids"]
    return ids
