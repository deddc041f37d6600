"""One tokenizer, several threads: what one encodes changes nothing of what another renders."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from transformers import PreTrainedTokenizerBase

from condense_core.decoder.prompt import encode_context, split_prompt

ROUNDS = 300


@contextmanager
def switching_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def test_two_threads_encode_while_two_render(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "He wrote </s>[INST] and [/INST] on the wall. " * 3
    encoded, pieces = encode_context(tokenizer, text), split_prompt(tokenizer, 2, "Who was it?")

    def wrong(found: Callable[[], object], expected: object) -> int:
        return sum(found() != expected for _ in range(ROUNDS))

    def encoding() -> int:
        return wrong(lambda: encode_context(tokenizer, text), encoded)

    def rendering() -> int:
        return wrong(lambda: split_prompt(tokenizer, 2, "Who was it?"), pieces)

    with switching_often(), ThreadPoolExecutor(4) as pool:
        results = [pool.submit(job) for job in (encoding, rendering, encoding, rendering)]
        assert [result.result() for result in results] == [0, 0, 0, 0]


def test_encoding_does_not_depend_on_a_switch_that_another_thread_left_on(tokenizer: PreTrainedTokenizerBase) -> None:
    pieces = split_prompt(tokenizer, 1, "Who was it?")
    tokenizer("a", split_special_tokens=True)  # transformers leaves it on in the backend
    assert split_prompt(tokenizer, 1, "Who was it?") == pieces
