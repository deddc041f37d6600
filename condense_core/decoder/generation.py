"""What every way to generate has in common: default options, and text piece by piece as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList, TextIteratorStreamer


def generation_options(
    tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, options: dict[str, Any]
) -> dict[str, Any]:
    """Options for ``model.generate``: greedy unless ``options`` say otherwise."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": pad, **options}


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
