"""The answers to all questions about contexts, and what the expected answers cost, from one reading of each context.

The prompts of these questions begin alike: with the template, and the context as text, as soft tokens or as a cache.
That is read once; the questions are then answered, and the expected answers scored, as one batch behind it
(``shared_prompts``). Where a model does not allow this (other attention functions, sliding windows shorter than the
prompt), every prompt is read whole.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from condense_core.compressor.condenser import Condenser, Context
from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.decoder.architecture import decoder_parts
from condense_core.decoder.generation import check_room, generation_options
from condense_core.decoder.logits import dense_head_input
from condense_core.decoder.prompt import TemplateArgs, render
from condense_core.pruning.branches import WindowTooShort
from condense_core.pruning.cache import PrunedCache
from condense_core.pruning.text import answer_loss as answer_loss_behind
from condense_core.pruning.text import ask, question_ids
from condense_core.tasks.generators import Turn
from condense_core.tasks.shared_prompts import (
    NotShared,
    Parts,
    branches_behind,
    branches_of,
    contexts_at_once,
    left_padded_ids,
    said_behind,
    split_prompts,
    synchronize,
)


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
    [found] = answers_about_many(condenser, [context], turns, max_new_tokens)
    return found


def answers_about_many(
    condenser: Condenser, contexts: Sequence[Context], turns: Sequence[Turn], max_new_tokens: int
) -> list[Answers]:
    """As ``answers_about``, of each of several contexts about which the same is asked.

    Soft tokens of one length are read side by side, as many at once as memory allows. What a context is answered does
    not depend on the others but in the last bits.
    """
    found: dict[int, Answers] = {}
    alike: dict[object, list[int]] = {}
    for i, context in enumerate(contexts):
        alike.setdefault(len(context) if isinstance(context, SoftTokens) else f"text {i}", []).append(i)
    for places in alike.values():
        group = [contexts[i] for i in places]
        try:
            read = _read_alike(condenser, group, turns, max_new_tokens)
        except (NotShared, WindowTooShort):
            read = [answers_from_each(condenser, [one] * len(turns), turns, max_new_tokens) for one in group]
        found.update(zip(places, read, strict=True))
    return [found[i] for i in range(len(contexts))]


@torch.no_grad()
def _read_alike(
    condenser: Condenser, contexts: Sequence[Context], turns: Sequence[Turn], max_new_tokens: int
) -> list[Answers]:
    """Of one text, or of soft tokens of one length."""
    model, tokenizer = condenser.model, condenser.tokenizer
    shared, questions = split_prompts(
        [condenser.prompt_parts(contexts[0], turn.question, max_new_tokens=max_new_tokens) for turn in turns]
    )
    answers = [answer_ids(tokenizer, turn.question, turn.answer, condenser.template_args) for turn in turns]
    size = contexts_at_once(model, sum(map(len, shared)), questions, answers, max_new_tokens)
    found: list[Answers] = []
    while len(found) < len(contexts):
        some = contexts[len(found) : len(found) + size]
        started = time.perf_counter()
        try:
            said = said_behind(
                branches_behind(model, torch.stack([_embeds(condenser, shared, one) for one in some])),
                tokenizer,
                questions * len(some),
                answers * len(some),
                max_new_tokens,
            )
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = (size + 1) // 2
            continue
        synchronize(model)
        ms = (time.perf_counter() - started - said.scoring) * 1e3 / len(said.texts)
        for first in range(0, len(said.texts), len(turns)):
            rows = slice(first, first + len(turns))
            found.append(Answers(said.texts[rows], said.losses[rows], ms))
    return found


def _embeds(condenser: Condenser, shared: Parts, context: Context) -> Tensor:
    """``[P, d]``, what prompts about ``context`` begin with: ``shared`` with its soft tokens."""
    if not isinstance(context, SoftTokens):
        return condenser.embed_parts(shared)
    own = condenser.context_embeds(context)
    return condenser.embed_parts([own if isinstance(part, Tensor) else part for part in shared])


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
        said = said_behind(branches_of(model, cache), tokenizer, questions, answers, max_new_tokens)
    except (NotShared, WindowTooShort):
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "template_args": args}
        texts = [ask(model, tokenizer, cache, turn.question, **settings) for turn in turns]
        ms = (time.perf_counter() - started) * 1e3 / len(turns)
        pairs = zip(questions, answers, strict=True)
        return Answers(texts, [answer_loss_behind(model, cache, question, answer) for question, answer in pairs], ms)
    synchronize(model)
    return Answers(said.texts, said.losses, (time.perf_counter() - started - said.scoring) * 1e3 / len(turns))


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
    ids, mask = left_padded_ids(questions, device)
    count = batch.get_seq_length() + ids.shape[1]
    check_room(model, count, max_new_tokens, "question: {} with the context before it", "expected a shorter one")
    with batch.attached(model), dense_head_input(model):
        tokens = model.generate(**batch.inputs(ids, mask), **settings)
    texts = [text.strip() for text in tokenizer.batch_decode(tokens[:, ids.shape[1] :], skip_special_tokens=True)]
    synchronize(model)
    ms = (time.perf_counter() - started) * 1e3 / len(turns)
    answers = [answer_ids(tokenizer, turn.question, turn.answer, args) for turn in turns]
    batch = PrunedCache.stacked(caches)
    ids, mask = left_padded_ids([[*q, *a] for q, a in zip(questions, answers, strict=True)], device)
    kept = max(map(len, answers)) + 1
    with batch.attached(model), dense_head_input(model):
        logits = model(**batch.inputs(ids, mask), logits_to_keep=kept).logits.float()
    losses = [
        float(F.cross_entropy(logits[row, -len(answer) - 1 : -1], ids[row, -len(answer) :]))
        for row, answer in enumerate(answers)
    ]
    return Answers(texts, losses, ms)


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
