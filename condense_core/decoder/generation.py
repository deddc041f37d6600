"""What every way to generate has in common: default options, and text piece by piece as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList, TextIteratorStreamer

_OF_THE_PROMPT = (
    *("input_ids", "inputs", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "cache_position"),
    "logits_to_keep",
)
_OF_A_DICT = (
    *("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states"),
    "return_legacy_cache",
)
_ASSISTED = ("assistant_model", "assistant_tokenizer", "prompt_lookup_num_tokens", "assistant_early_exit")


def generation_options(
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    options: Mapping[str, Any],
    *,
    cached: bool = False,
    streaming: bool = False,
) -> dict[str, Any]:
    """Options for ``model.generate``: greedy, one answer, unless ``options`` say otherwise.

    Args:
        tokenizer: gives the padding token.
        max_new_tokens: unless a ``generation_config`` among the options has its own.
        options: as ``model.generate`` takes them, among them a ``generation_config``, whose values count unless an
            option of the same name is given.
        cached: the prompt continues a cache.
        streaming: the answer is wanted piece by piece.

    Raises:
        ValueError: an option has no meaning where the answer is text; the message names it.
    """
    config = options.get("generation_config")
    given = {name: value for name, value in options.items() if name != "generation_config"}
    refused = [*_OF_THE_PROMPT, *_OF_A_DICT, *_ASSISTED, "max_length", "num_return_sequences", "num_beams"]
    for name in (*refused, "do_sample", "max_new_tokens", "use_cache", "cache_implementation", "pad_token_id"):
        value = getattr(config, name, None)
        if value is not None and name not in given:
            given[name] = value
    if config is not None:  # a default of transformers', which every config has, is nothing that was asked for
        if given.get("max_length") == 20:
            del given["max_length"]
        given["generation_config"] = config
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    settings = {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "num_beams": 1,
        "num_return_sequences": 1,
        "return_dict_in_generate": False,
        "pad_token_id": pad,
        **given,
    }
    _check(settings, cached, streaming)
    return settings


def _check(settings: dict[str, Any], cached: bool, streaming: bool) -> None:
    def refuse(name: str, expected: str) -> None:
        raise ValueError(f"{name}: got {settings[name]!r:.60}, expected {expected}")

    for name in _OF_THE_PROMPT:
        if settings.get(name) is not None:
            raise ValueError(f"{name}: comes with the prompt; expected options of the generation only")
    for name in _OF_A_DICT:
        if settings.get(name):
            refuse(name, "none, since the answer is text; model.generate gives more")
    for name in _ASSISTED:
        if settings.get(name) is not None:
            raise ValueError(f"{name}: assisted generation is not supported here; expected generation without it")
    if settings.get("max_length") is not None:
        refuse("max_length", "max_new_tokens instead, which does not count the prompt")
    if settings["num_return_sequences"] != 1:
        refuse("num_return_sequences", "1: there is one answer to a prompt; ask several times")
    for name in ("max_new_tokens", "num_beams"):
        value = settings[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            refuse(name, "an integer of at least 1")
    if streaming and settings["num_beams"] > 1:
        refuse("num_beams", "1 to stream, since beams are known at their end only")
    if streaming and settings.get("streamer") is not None:
        raise ValueError("streamer: this streams by itself; expected none, or ask without streaming")
    if cached:
        if settings.get("use_cache") is False:
            refuse("use_cache", "none: the context is a cache")
        if settings.get("cache_implementation") is not None:
            refuse("cache_implementation", "none: the context is a cache already")


def check_room(model: PreTrainedModel, count: int, max_new_tokens: int, what: str, remedy: str) -> None:
    """``ValueError`` unless the model has positions for a prompt of ``count`` and all new tokens but the last.

    Args:
        model: its ``config.max_position_embeddings`` is the limit.
        count: positions of the prompt.
        max_new_tokens: 0 where nothing is generated.
        what: the message's beginning, with ``{}`` for the number of positions.
        remedy: its end.
    """
    limit = int(model.config.max_position_embeddings)
    if count + max(max_new_tokens - 1, 0) <= limit:
        return
    new, more = "", ""
    if count <= limit:
        new, more = f" and up to {max_new_tokens:,} new tokens", ", or a smaller max_new_tokens"
    raise ValueError(f"{what.format(f'{count:,} positions')}{new}, the model has {limit:,}; {remedy}{more}")


def streamed(
    generate: Callable[..., Any], tokenizer: PreTrainedTokenizerBase, stopping_criteria: Iterable[Any] = ()
) -> Iterator[str]:
    """The text of a generation, in pieces; closing the iterator ends the generation.

    generate: calls ``model.generate`` with the ``streamer=`` and ``stopping_criteria=`` that it is given; it runs in a
    thread of its own, and what it raises is raised here.
    """
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failure: list[BaseException] = []
    closed = Event()

    def is_closed(input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), closed.is_set(), device=input_ids.device)

    def work() -> None:
        try:
            generate(streamer=streamer, stopping_criteria=StoppingCriteriaList([*stopping_criteria, is_closed]))
        except BaseException as error:
            failure.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        closed.set()
        thread.join()
    if failure:
        raise failure[0]


def left_padded(prompts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack prompts of different lengths; padding stands on the left, where generation does not see it."""
    width = max(p["attention_mask"].shape[1] for p in prompts)

    def pad(tensor: Tensor) -> Tensor:
        missing = width - tensor.shape[1]
        shape = (1, missing, *tensor.shape[2:])
        return torch.cat([tensor.new_zeros(shape), tensor], 1)

    return {key: torch.cat([pad(p[key]) for p in prompts]) for key in prompts[0]}
