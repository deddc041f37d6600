"""Text to cache and back: a context is read once into a pruned cache, and questions about it are answered from that.

The prompt is the one that ``prompt.render`` writes around a context. What stands before the context (the template's
first tokens) and the context itself go into the cache; what stands behind it (the question, and the template's end)
is fed to the model for every question anew, and forgotten again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from condense_core.decoder.architecture import decoder_parts
from condense_core.decoder.generation import check_room, generation_options, streamed
from condense_core.decoder.prompt import TemplateArgs, check_text, encode_before_question, split_prompt
from condense_core.pruning.base import Method
from condense_core.pruning.cache import PrunedCache
from condense_core.pruning.prompt import Prompt

_lock = Lock()
_busy: WeakSet[PrunedCache] = WeakSet()  # caches that somebody is asking


def prefill(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    method: Method,
    *,
    chunk_size: int | None = None,
    template_args: TemplateArgs | None = None,
) -> PrunedCache:
    """What ``method`` keeps of ``text``, with the tokens of the chat template before it.

    ``template_args`` are variables of the chat template, ``system_prompt`` among them a message before the user's; give
    the same ones with the questions. ``ValueError`` for an empty text, or one longer than the model's positions; else
    as ``PrunedCache.prefill``.
    """
    prompt = prompt_of(model, tokenizer, text, template_args)
    ids = torch.tensor([prompt.input_ids], device=decoder_parts(model).embed_tokens.weight.device)
    return PrunedCache.prefill(model, ids, method.for_prompt(prompt), chunk_size=chunk_size)


def prompt_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, template_args: TemplateArgs | None = None
) -> Prompt:
    """``text`` as a cache of it is made; arguments and errors as of ``prefill``."""
    return Prompt(tokenizer, tuple(context_ids(model, tokenizer, text, template_args)), text, template_args)


def __getattr__(name: str) -> Any:
    """``read`` is the former name of ``prefill``; it goes in release 0.3."""
    if name == "read":
        warnings.warn("condense_core.pruning.text.read is now prefill", DeprecationWarning, stacklevel=2)
        return prefill
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def context_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, template_args: TemplateArgs | None = None
) -> list[int]:
    """The tokens that a cache of ``text`` is made of: those of the chat template before it, then its own.

    ``ValueError`` for an empty text, or one longer than the model's positions.
    """
    ids = encode_before_question(tokenizer, text, template_args)
    limit = int(model.config.max_position_embeddings)
    if len(ids) > limit:
        raise ValueError(
            f"text: {len(ids):,} tokens with the template before it, the model has {limit:,} positions; expected a "
            "shorter text, or a model of more positions"
        )
    return ids


def question_ids(
    tokenizer: PreTrainedTokenizerBase, question: str, template_args: TemplateArgs | None = None
) -> list[int]:
    """The tokens behind a context: ``question`` and the end of the template, ready for the model's answer."""
    check_text(question, "question")
    return split_prompt(tokenizer, 1, question, template_args)[1]


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: PrunedCache,
    question: str,
    *,
    max_new_tokens: int = 64,
    template_args: TemplateArgs | None = None,
    **options: Any,
) -> str:
    """The model's answer about the context of ``cache``, which afterwards holds what it held before.

    Greedy unless ``options``, which go to ``model.generate``, say otherwise. With ``num_beams`` the cache holds its
    context that many times while it is asked.

    Raises:
        ValueError: the cache is of another model, dtype or device, of several contexts, or has too few positions left;
            or an option has no meaning here.
    """
    settings = generation_options(tokenizer, max_new_tokens, options, cached=True)
    ids = question_ids(tokenizer, question, template_args)
    inputs = _behind(model, cache, ids, settings["max_new_tokens"])
    with restoring(model, cache, settings["num_beams"]):
        tokens = model.generate(**inputs, **settings)
    answer = tokens[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(answer, skip_special_tokens=True)).strip()


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: PrunedCache,
    question: str,
    *,
    max_new_tokens: int = 64,
    template_args: TemplateArgs | None = None,
    **options: Any,
) -> Iterator[str]:
    """As ``ask``, piece by piece as they come; closing the iterator ends the generation."""
    settings = generation_options(tokenizer, max_new_tokens, options, cached=True, streaming=True)
    inputs = _behind(model, cache, question_ids(tokenizer, question, template_args), settings["max_new_tokens"])

    def generate(**more: Any) -> None:
        with restoring(model, cache):
            model.generate(**inputs, **settings, **more)

    return streamed(generate, tokenizer, settings.pop("stopping_criteria", ()))


@torch.no_grad()
def answer_loss(model: PreTrainedModel, cache: PrunedCache, question: list[int], answer: list[int]) -> float:
    """Mean negative log-likelihood of ``answer`` behind ``question``, token ids of both, in nats per token."""
    inputs = _behind(model, cache, question + answer)
    with restoring(model, cache):
        logits = model(**inputs, logits_to_keep=len(answer) + 1).logits
    return float(F.cross_entropy(logits[0, :-1].float(), inputs["input_ids"][0, len(question) :]))


@contextmanager
def restoring(model: PreTrainedModel, cache: PrunedCache, num_copies: int = 1) -> Iterator[None]:
    """Inside, ``model`` reads behind ``cache``, which holds its context ``num_copies`` times.

    What that adds to the cache is forgotten at the end. ``ValueError`` while somebody else does so.
    """
    with _lock:
        if cache in _busy:
            raise ValueError(
                "cache: it is being asked already, in another thread or by a stream that has not ended; expected one "
                "question at a time, or a cache for each (PrunedCache.load reads a second one)"
            )
        _busy.add(cache)
    try:
        with _restoring(model, cache, num_copies):
            yield
    finally:
        with _lock:
            _busy.discard(cache)


@contextmanager
def _restoring(model: PreTrainedModel, cache: PrunedCache, num_copies: int) -> Iterator[None]:
    seen = cache.get_seq_length()
    # no_grad and not inference_mode: buffers that grow in here are written again outside.
    with cache.attached(model), torch.no_grad():
        try:
            if num_copies > 1:
                cache.batch_repeat_interleave(num_copies)
            yield
        finally:
            for layer in cache.layers:
                layer.crop(seen - layer.get_seq_length())
            if num_copies > 1:  # beams change what came behind the context, which all have in common
                cache.batch_select_indices(torch.zeros(1, dtype=torch.long, device=cache.layers[0].keys.device))


def _behind(model: PreTrainedModel, cache: PrunedCache, ids: list[int], max_new_tokens: int = 0) -> dict[str, Any]:
    """The model's inputs for ``ids`` behind the one context of ``cache``, once they fit each other."""
    if len(cache.lengths) != 1:
        raise ValueError(f"cache: it holds {len(cache.lengths)} contexts, expected one; see batch_select_indices")
    cache.check_model(model)
    weight = decoder_parts(model).embed_tokens.weight
    layer: Any = cache.layers[0]
    for what, came, expected in (("dtype", layer.dtype, weight.dtype), ("device", layer.device, weight.device)):
        if came != expected:
            raise ValueError(f"cache: its {what} is {came}, the model's {expected}; expected the same for both")
    count = cache.get_seq_length() + len(ids)
    check_room(model, count, max_new_tokens, "question: {} with the context before it", "expected a shorter one")
    return cache.inputs(torch.tensor([ids], device=weight.device))
