"""A model and what is offered of it: the half of serving that knows compressors, pruning and tokenizers.

``prepare`` runs in a thread of its own and touches no device; ``run`` is called by the one thread that owns the device.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from condense_core.compressor.choice import find_checkpoint
from condense_core.compressor.compiled import check_mode
from condense_core.compressor.condenser import Condenser
from condense_core.compressor.config import COMPRESSION_METHODS, TRAINED_METHODS
from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.decoder.model import open_decoder
from condense_core.profiling.stages import StageTimer
from condense_core.pruning.build import build, fitting_keep
from condense_core.pruning.cache import PrunedCache
from condense_core.pruning.text import ask, context_ids, prefill, question_ids
from condense_core.serving.errors import InvalidRequest
from condense_core.serving.queue import Prepared
from condense_core.serving.requests import AnswerRequest, CompressRequest, PruneRequest, Request, with_message
from condense_core.tasks.evaluate import synchronize

DEFAULT_KEEP = 0.25
PRUNE_METHOD, PRUNE_METHOD_ASKED = "sentences(surprise)", "sentences(query_aware(peak_attention))"
"""What prunes where a request names nothing, without and with a question; docs/pruning.md says why these."""
_MAX_WRAPPERS = 3


@dataclass(frozen=True)
class Result:
    """What became of requests that ran together.

    values: one for each. stages: seconds of the whole.
    """

    values: list[Any]
    stages: dict[str, float]


class ServedModel:
    """A model, its compressors, and the work of the requests for them."""

    def __init__(
        self, condensers: Sequence[Condenser], *, prunes: bool = True, answers: bool = True, exact: bool | None = None
    ) -> None:
        """Offer what ``condensers``, all over one model, make.

        Args:
            condensers: one for each method; the first is the one that requests get which name none.
            prunes: whether pruned caches are offered. answers: whether questions are.
            exact: whether each text is read in a pack of its own, so that soft tokens are the same bit for bit whatever
                a request was batched with; None: on a CPU, where packs save little. The size of a matrix product
                decides the order of its sums.

        Raises:
            ValueError: there is none, two are of one method, or they are over different models.
        """
        self.condensers = {condenser.config.method: condenser for condenser in condensers}
        if not condensers or len(self.condensers) < len(condensers):
            raise ValueError(f"condensers: got {len(condensers)}, expected at least one, and one for each method")
        self.model: PreTrainedModel = condensers[0].model
        self.tokenizer: PreTrainedTokenizerBase = condensers[0].tokenizer
        if any(condenser.model is not self.model for condenser in condensers):
            raise ValueError("condensers: they are over different models, expected one")
        self.prunes, self.answers = prunes, answers
        self.device, self.model_id = condensers[0].device, condensers[0].model_id
        self.exact = self.device.type == "cpu" if exact is None else exact

    @classmethod
    def load(
        cls,
        name_or_path: str | Path,
        methods: Sequence[str] | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        compressors: Sequence[str | Path] = (),
        compile_encoder: str | None = None,
        **options: Any,
    ) -> ServedModel:
        """Load a model and its compressors.

        Args:
            name_or_path, device, dtype: as for ``Condenser.from_pretrained``.
            methods: the first is the one for requests that name none; None: all that the model has a trained compressor
                of, and ``select``.
            compressors: folders of compressor checkpoints, which go before those that the model has.
            compile_encoder: as for ``Condenser``, of all methods but ``select``, which cannot.
            options: of ``ServedModel``.

        Raises:
            ValueError: a name stands for nothing that can be loaded.
        """
        for method in methods or ():
            if method not in COMPRESSION_METHODS:
                raise ValueError(f"methods: got {method!r}, expected some of {', '.join(COMPRESSION_METHODS)}")
        check_mode(compile_encoder)
        model, tokenizer = open_decoder(name_or_path, device=device, dtype=dtype)
        opened = (Condenser(model, tokenizer, compressor=each, compile_encoder=compile_encoder) for each in compressors)
        made = {condenser.config.method: condenser for condenser in opened}
        wanted = methods or [
            *made,
            *(m for m in TRAINED_METHODS if m not in made and find_checkpoint(model, m)),
            "select",
        ]
        for method in dict.fromkeys(wanted):
            if method not in made:
                mode = None if method == "select" else compile_encoder
                made[method] = Condenser(model, tokenizer, method=method, compile_encoder=mode)
        return cls([made[method] for method in dict.fromkeys(wanted)], **options)

    # -- facts ---------------------------------------------------------------------------------------------------------

    @property
    def default_method(self) -> str:
        """The compressor for requests that name none."""
        return next(iter(self.condensers))

    def facts(self) -> dict[str, Any]:
        """What is offered, for people and programs: JSON."""
        return {
            "id": self.model_id,
            "digest": self.condensers[self.default_method].model_digest,
            "d_model": self.condensers[self.default_method].config.d_model,
            "dtype": str(self.condensers[self.default_method].dtype).removeprefix("torch."),
            "device": str(self.device),
            "max_positions": self.condensers[self.default_method].max_positions,
            "methods": {
                name: {"ratios": list(c.config.ratios) or "any", "takes_question": name == "select"}
                for name, c in self.condensers.items()
            },
            "default_method": self.default_method,
            "prunes": self.prunes,
            "answers": self.answers,
        }

    # -- the threads that tokenize -------------------------------------------------------------------------------------

    def kind(self, request: Request) -> tuple[str, str]:
        """What kind of work a request is, its method named."""
        if isinstance(request, AnswerRequest):
            return "answer", request.way
        assert isinstance(request, CompressRequest | PruneRequest)
        compress = isinstance(request, CompressRequest)
        method = request.method or (self.default_method if compress else "default")
        return "compress" if compress else "prune", method if request.question is None else f"{method} with a question"

    def prepare(self, request: Request) -> Prepared:
        """Check a request against what the model offers, and make tokens of its text.

        ``InvalidRequest`` for what it does not offer, or cannot read.
        """
        if isinstance(request, CompressRequest):
            return self._prepare_compress(request)
        if isinstance(request, PruneRequest):
            return self._prepare_prune(request)
        assert isinstance(request, AnswerRequest)
        if not self.answers:
            raise InvalidRequest("this server answers no questions, expected a text to compress")
        condenser = self._condenser(request.method)
        count = len(with_message(condenser.encode, request.text))
        if request.way == "soft":
            with_message(condenser.tokenize, request.text, request.ratio)
        elif request.way in ("full", "pruned"):
            with_message(context_ids, self.model, self.tokenizer, request.text)
        return Prepared(count + request.max_new_tokens, None, (self._answer, (request, count)))

    def _prepare_compress(self, request: CompressRequest) -> Prepared:
        condenser = self._condenser(request.method)
        made = with_message(
            condenser.tokenize,
            request.text,
            request.ratio,
            max_soft_tokens=request.max_soft_tokens,
            question=request.question,
        )
        batch = None if self.exact else (condenser.config.method, request.question is not None)
        return Prepared(made.num_read, batch, (condenser.config.method, made))

    def _condenser(self, method: str | None) -> Condenser:
        if (found := self.condensers.get(method or self.default_method)) is None:
            raise InvalidRequest(f"method: got {method!r}, expected one of {', '.join(self.condensers)}")
        return found

    def _prepare_prune(self, request: PruneRequest) -> Prepared:
        if not self.prunes:
            raise InvalidRequest("this server prunes no caches, expected a text to compress")
        ids = with_message(context_ids, self.model, self.tokenizer, request.text)
        asked = None
        if request.question is not None:
            asked = tuple(with_message(question_ids, self.tokenizer, request.question))
        spec = request.method or (PRUNE_METHOD if asked is None else PRUNE_METHOD_ASKED)
        # A colon names a file of this machine, and each wrapper may read the text once more.
        if not re.fullmatch(r"[\w()]{1,100}", spec) or spec.count("(") > _MAX_WRAPPERS:
            raise InvalidRequest(
                f"method: got {spec!r:.60}, expected a name such as snapkv, in at most {_MAX_WRAPPERS} wrappers"
            )
        keep, budget = request.keep, request.budget
        if keep is None and budget is None:
            keep = with_message(fitting_keep, spec, DEFAULT_KEEP, len(ids), asked)
        method = with_message(build, spec, keep=keep, budget=budget, question_ids=asked)
        return Prepared(len(ids), None, (self._prune, (request.text, method, request.storage)))

    # -- the thread of the device --------------------------------------------------------------------------------------

    def run(self, batch: Sequence[Prepared]) -> Result:
        """The results of requests that were prepared with an equal ``batch``, or of one."""
        how = batch[0].payload[0]
        if callable(how):
            started = time.perf_counter()
            value = how(batch[0].payload[1])
            return Result([value], {"encode": time.perf_counter() - started})
        condenser = self.condensers[how]
        started = time.perf_counter()
        with StageTimer(condenser.compressor, self.device) as timer:
            soft = condenser.compress_tokenized([each.payload[1] for each in batch])
        for each in soft:
            each.check_finite()  # waits for the device
        seconds, known = time.perf_counter() - started, timer.take()
        # All else is reading: `select` and `memory` have no module that does it in one call.
        rest = {stage: known[stage] for stage in ("pool", "project")}
        return Result(list(soft), {"encode": seconds - sum(rest.values()), **rest})

    def warm_up(self) -> Iterator[tuple[tuple[str, str], int, Callable[[], Any]]]:
        """Work of each common kind at two lengths: its kind, its tokens, and what does it."""
        text = "The keeper of the north archive counts the lamps at dusk, and writes their number down. "
        for method in self.condensers:
            for repeats in (4, 20):
                request = CompressRequest(text=text * repeats, method=method, max_soft_tokens=4096)
                try:
                    prepared = self.prepare(request)
                except InvalidRequest:  # a checkpoint of ratios that are too high for so short a text
                    continue
                yield self.kind(request), prepared.tokens, partial(self.run, [prepared])

    def release_memory(self) -> None:
        """Give what the device's allocator holds unused back to it, after it ran out."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def _prune(self, work: tuple[str, Any, str | None]) -> PrunedCache:
        text, method, storage = work
        cache = prefill(self.model, self.tokenizer, text, method)
        return cache if storage is None else cache.quantize(storage)

    def _answer(self, work: tuple[AnswerRequest, int]) -> dict[str, Any]:
        """The model's answer, and what the text took: positions, bytes of KV cache, seconds.

        work: the request, and the tokens of its text.
        """
        request, num_tokens = work
        condenser, new = self._condenser(request.method), request.max_new_tokens
        started = time.perf_counter()
        method = None
        if request.way == "pruned":
            method = PRUNE_METHOD
            ids = context_ids(self.model, self.tokenizer, request.text)
            pruning = build(method, keep=fitting_keep(method, 1 / request.ratio, len(ids), None))
            cache = prefill(self.model, self.tokenizer, request.text, pruning)
            synchronize(condenser)
            read = time.perf_counter()
            answer = ask(self.model, self.tokenizer, cache, request.question, max_new_tokens=new)
            positions, kv_bytes = round(len(ids) / cache.ratio), cache.nbytes
        else:
            given: str | SoftTokens = request.text if request.way == "full" else ""
            positions = num_tokens if request.way == "full" else 0
            if request.way == "soft":
                method = condenser.config.method
                question = request.question if method == "select" else None
                given = condenser.compress(request.text, request.ratio, question=question)
                positions = len(given)
                synchronize(condenser)
            read = time.perf_counter()
            answer = str(condenser.generate(given, request.question, max_new_tokens=new))
            kv_bytes = condenser.kv_bytes(positions)
        return {
            "answer": answer,
            "way": request.way,
            "method": method,
            "context_tokens": num_tokens,
            "positions": positions,
            "kv_bytes": kv_bytes,
            "read_ms": round((read - started) * 1e3, 1),
            "answer_ms": round((time.perf_counter() - read) * 1e3, 1),
        }
