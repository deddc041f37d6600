"""Prompts that begin alike: what they share is read once, and the rest of them as one batch behind it.

The questions about one context share the template's beginning and the context. Contexts of one length, each with the
same questions, are read side by side, without padding between them. Behind a context stand its questions
(``pruning.branches``); behind a question first its expected answer is scored, then taken back, and the model's own
answer is generated. Every token of a prompt is read once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache

from condense_core.decoder.architecture import decoder_parts
from condense_core.decoder.generation import generation_options
from condense_core.decoder.logits import dense_head_input
from condense_core.pruning.branches import Branches

#: Bytes of the attention weights of one layer that a batch of questions may take.
_MAX_WEIGHTS = 256 * 2**20
#: Bytes that contexts which are read side by side may take: keys and values, attention weights of a layer, and logits.
#: A CPU is as fast with a few dozen rows as with hundreds; a GPU reads all weights for however few.
_MAX_BYTES, _MAX_BYTES_CPU = 2 * 2**30, 2**29
_COPIES = 3  # of attention weights: logits, their float32 form with all columns, and the softmax of it

Parts = list[list[int] | Tensor]
"""Of a prompt: token ids, and soft tokens ``[k, d]``."""


class NotShared(Exception):
    """The questions cannot be asked as a batch behind what they share."""


@dataclass(frozen=True)
class Said:
    """What a model said to rows of questions.

    Attributes:
        texts: its answers. losses: of the expected answers, mean negative log-likelihood, nats per token.
        scoring: seconds of all that went into the losses alone.
    """

    texts: list[str]
    losses: list[float]
    scoring: float


# -- what prompts share ------------------------------------------------------------------------------------------------


def split_prompts(prompts: Sequence[Parts]) -> tuple[Parts, list[list[int]]]:
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
def branches_behind(model: PreTrainedModel, embeds: Tensor) -> Branches:
    """Behind C contexts ``embeds [C, P, d]``, which are read here; P may be 0."""
    branches = branches_of(model, None)
    if not embeds.shape[1]:
        return branches
    cache = DynamicCache()
    decoder_parts(model)(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
    return branches_of(model, cache)


def branches_of(model: PreTrainedModel, cache: Cache | None) -> Branches:
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


def contexts_at_once(
    model: PreTrainedModel, past: int, questions: Sequence[list[int]], answers: Sequence[list[int]], num_new: int
) -> int:
    """How many contexts of ``past`` tokens, each with all ``questions``, a batch may hold; at least one."""
    config, head = model.config, model.get_output_embeddings().weight
    longest = max(map(len, answers))
    own = max(map(len, questions)) + max(longest, num_new)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * dim * head.element_size()
    each = own * token + _weights(model, past, own) + longest * len(head) * head.element_size()
    most = _MAX_BYTES_CPU if model.device.type == "cpu" else _MAX_BYTES
    return max(1, most // (past * token + len(questions) * each))


def _weights(model: PreTrainedModel, past: int, own: int) -> int:
    """Bytes of one row's attention weights in one layer: ``own`` tokens that look at ``past`` and at each other."""
    return _COPIES * 4 * int(model.config.num_attention_heads) * own * (past + own)


# -- questions behind it -----------------------------------------------------------------------------------------------


@torch.no_grad()
def said_behind(
    branches: Branches,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[list[int]],
    answers: Sequence[list[int]],
    max_new_tokens: int,
) -> Said:
    """What the model says to ``questions``, greedily, and what their expected ``answers`` cost.

    Args:
        branches: behind the contexts. Of C contexts the questions to the first stand first, then those to the second.
    """
    texts: list[str] = []
    losses: list[float] = []
    scoring = 0.0
    for rows in _batches(branches, questions, answers, max_new_tokens):
        some = _said(branches, tokenizer, [questions[i] for i in rows], [answers[i] for i in rows], max_new_tokens)
        texts, losses, scoring = texts + some.texts, losses + some.losses, scoring + some.scoring
    return Said(texts, losses, scoring)


def _batches(
    branches: Branches, questions: Sequence[list[int]], answers: Sequence[list[int]], num_new: int
) -> Iterator[range]:
    """Questions about one context, as many at once as their attention weights may take; those about several together.

    How many contexts these are, ``contexts_at_once`` has said.
    """
    size = len(questions)
    if branches.num_contexts == 1:
        own = max(map(len, questions)) + max(num_new, *map(len, answers))
        size = max(1, _MAX_WEIGHTS // _weights(branches.model, branches.past, own))
    yield from (range(i, min(i + size, len(questions))) for i in range(0, len(questions), size))


def _said(
    branches: Branches,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[list[int]],
    answers: Sequence[list[int]],
    max_new_tokens: int,
) -> Said:
    model, device = branches.model, branches.inner.embed_tokens.weight.device
    ids, mask = left_padded_ids(questions, device)
    wanted = torch.tensor([row + [0] * (max(map(len, answers)) - len(row)) for row in answers], device=device)
    inputs = branches.inputs(ids, mask)
    seen, positions, cache = inputs["attention_mask"], inputs["position_ids"], inputs["past_key_values"]
    settings = generation_options(tokenizer, max_new_tokens, {}, cached=True)
    with branches, dense_head_input(model):
        if ids.shape[1] > 1:  # all but the last tokens, behind which answers begin
            branches.inner(
                input_ids=ids[:, :-1],
                attention_mask=seen[:, :-1],
                position_ids=positions[:, :-1],
                past_key_values=cache,
                use_cache=True,
            )
        started = _now(model)
        count = wanted.shape[1]
        logits = model(
            input_ids=torch.cat([ids[:, -1:], wanted[:, :-1]], 1),
            attention_mask=torch.cat([seen, seen.new_ones(len(ids), count - 1)], 1),
            position_ids=positions[:, -1:] + torch.arange(count, device=device),
            past_key_values=cache,
        ).logits
        losses = torch.stack(
            [
                F.cross_entropy(row[: len(answer)].float(), target[: len(answer)])
                for row, answer, target in zip(logits, answers, wanted, strict=True)
            ]
        ).tolist()
        del logits
        scoring = _now(model) - started
        for layer in cache.layers:
            layer.forget(count)
        tokens = model.generate(
            input_ids=ids[:, -1:],
            attention_mask=seen,
            position_ids=positions[:, -1:],
            past_key_values=cache,
            **settings,
        )
    texts = [text.strip() for text in tokenizer.batch_decode(tokens[:, 1:], skip_special_tokens=True)]
    return Said(texts, losses, scoring)


def left_padded_ids(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask, ``[B, longest]``; padding is token 0."""
    width = max(map(len, rows))
    ids = [[0] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _now(model: PreTrainedModel) -> float:
    synchronize(model)
    return time.perf_counter()


def synchronize(model: PreTrainedModel) -> None:
    """Wait until a GPU has done what it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
