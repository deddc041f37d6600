"""A backend without a model, whose work takes as long as a test says, and fails as it says."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import torch

from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.serving.errors import InvalidRequest
from condense_core.serving.queue import Prepared
from condense_core.serving.requests import CompressRequest, Request
from condense_core.serving.served import Result


@dataclass
class FakeBackend:
    """Makes one soft token, the number of characters, of every text.

    seconds: that a batch takes for each of its requests. gate: work waits for it where there is one. fails: called with
    the texts of a batch; what it returns is raised. together: whether requests run together.
    """

    seconds: float = 0.0
    gate: Event | None = None
    fails: Callable[[list[str]], BaseException | None] = lambda texts: None
    together: bool = True
    batches: list[list[str]] = field(default_factory=list)
    released: int = 0
    prepared: int = 0

    def kind(self, request: Request) -> Hashable:
        return type(request).__name__

    def prepare(self, request: Request) -> Prepared:
        self.prepared += 1
        if not isinstance(request, CompressRequest):
            raise InvalidRequest("this backend compresses only")
        if "unreadable" in request.text:
            raise InvalidRequest("text: unreadable, expected another")
        if "mistake" in request.text:
            raise KeyError(request.text)
        return Prepared(len(request.text), "all" if self.together else None, request.text)

    def run(self, batch: Sequence[Prepared]) -> Result:
        texts = [each.payload for each in batch]
        self.batches.append(texts)
        if self.gate is not None:
            assert self.gate.wait(30)
        time.sleep(self.seconds * len(texts))
        if (error := self.fails(texts)) is not None:
            raise error
        soft = [
            SoftTokens(torch.full((1, 2), float(len(text))), num_context_tokens=1, ratio=1, model_id="fake")
            for text in texts
        ]
        return Result(list(soft), {"encode": 0.0})

    def warm_up(self) -> Iterator[tuple[Hashable, int, Callable[[], Any]]]:
        if self.gate is None:
            for tokens in (1, 10):
                yield "CompressRequest", tokens, lambda: time.sleep(self.seconds)

    def release_memory(self) -> None:
        self.released += 1

    def facts(self) -> dict[str, Any]:
        return {"id": "fake"}
