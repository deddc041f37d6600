"""A served model: results do not depend on company, and nothing of the machine can be named from outside."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch
import torch._dynamo.testing

from condense_core.compressor.condenser import Condenser
from condense_core.compressor.encoder import Encoder
from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.decoder.embedded import embedded_model_path
from condense_core.pruning.build import build
from condense_core.pruning.cache import PrunedCache
from condense_core.pruning.text import ask, prefill
from condense_core.serving.engine import CompressionEngine, EngineLimits
from condense_core.serving.errors import InvalidRequest
from condense_core.serving.requests import AnswerRequest, CompressRequest, PruneRequest, Request
from condense_core.serving.served import ServedModel
from condense_core.serving.spec import EngineSpec
from condense_core.tasks.sources import ProseWriter

PROSE = ProseWriter().document(3, 60)
TEXTS = [PROSE[i * 97 : i * 97 + n] for i, n in enumerate((40, 700, 120, 1800, 300, 90, 1100, 55, 410, 640))]
QUESTION = "Who is the keeper of the north archive?"


@pytest.fixture(scope="module")
def served() -> ServedModel:
    return ServedModel.load(embedded_model_path(), device="cpu")


def answered(served: ServedModel, requests: list[Request], **limits: Any) -> list[Any]:
    """What an engine makes of requests that come all at once."""

    async def main() -> list[Any]:
        async with CompressionEngine(served, limits=EngineLimits(**{"cache_bytes": 0} | limits)) as engine:
            return list(await asyncio.gather(*map(engine.submit, requests)))

    return asyncio.run(asyncio.wait_for(main(), 120))


def test_soft_tokens_are_the_same_bit_for_bit_alone_and_among_others(served: ServedModel) -> None:
    ratios = [2, 4, 8, 4, 16, 2, 4, 2, 8, 4]
    requests: list[Request] = [
        CompressRequest(text=text, ratio=ratio) for text, ratio in zip(TEXTS, ratios, strict=True)
    ]
    requests += [
        CompressRequest(text=text, ratio=ratio, method="select", question=QUESTION if i % 2 else None)
        for i, (text, ratio) in enumerate(zip(TEXTS, ratios, strict=True))
    ]
    together = answered(served, requests)
    for request, soft in zip(requests, together, strict=True):
        assert isinstance(request, CompressRequest)
        condenser = served.condensers[request.method or served.default_method]
        alone = condenser.compress(request.text, request.ratio or 4, question=request.question)
        assert torch.equal(soft.embeds, alone.embeds)
        assert soft.to_bytes() == alone.to_bytes()


def test_packed_they_are_the_same_within_rounding(served: ServedModel) -> None:
    packing = ServedModel(list(served.condensers.values()), exact=False)
    requests: list[Request] = [
        CompressRequest(text=text, ratio=ratio, method=method)
        for method in ("pool", "memory", "select")
        for text, ratio in zip(TEXTS, [2, 4, 8, 4, 16, 2, 4, 2, 8, 4], strict=True)
    ]
    batches = []
    together = packing.run

    def run(batch: Any) -> Any:
        batches.append(len(batch))
        return together(batch)

    packing.run = run  # type: ignore[method-assign]
    for request, soft in zip(requests, answered(packing, requests), strict=True):
        assert isinstance(request, CompressRequest)
        alone = served.condensers[request.method or ""].compress(request.text, request.ratio or 4)
        assert soft.text == alone.text
        # fp32 through six layers, with sums in another order.
        torch.testing.assert_close(soft.embeds, alone.embeds, rtol=1e-3, atol=1e-4)
    assert max(batches) > 1


def test_pruned_caches_and_answers_are_those_of_the_library(served: ServedModel) -> None:
    text = TEXTS[3]
    requests: list[Request] = [
        PruneRequest(text=text, method="snapkv", keep=0.5),
        CompressRequest(text=text, ratio=4),
        PruneRequest(text=text, method="snapkv", keep=0.5, storage="int8"),
        *(AnswerRequest(text=text, question=QUESTION, way=way, max_new_tokens=8) for way in ("full", "soft", "pruned")),
        AnswerRequest(text=text, question=QUESTION, way="nothing", max_new_tokens=8),
    ]
    cache, soft, small, *answers = answered(served, requests)
    assert isinstance(cache, PrunedCache)
    assert isinstance(soft, SoftTokens)
    expected = prefill(served.model, served.tokenizer, text, build("snapkv", keep=0.5))
    assert all(torch.equal(mine.keys, theirs.keys) for mine, theirs in zip(cache.layers, expected.layers, strict=True))
    assert small.nbytes < 0.6 * cache.nbytes
    condenser = served.condensers["pool"]
    assert [each["answer"] for each in answers[:2]] == [
        condenser.generate(given, QUESTION, max_new_tokens=8) for given in (text, soft)
    ]
    assert ask(served.model, served.tokenizer, expected, QUESTION, max_new_tokens=4)
    num_tokens = len(condenser.encode(text))
    assert [each["context_tokens"] for each in answers] == [num_tokens] * 4
    assert [each["method"] for each in answers] == [None, "pool", "sentences(surprise)", None]
    full, soft_one, pruned, nothing = (each["positions"] for each in answers)
    assert (full, soft_one, nothing) == (num_tokens, len(soft), 0)
    assert 0 < pruned < num_tokens
    assert [each["kv_bytes"] for each in answers[:2]] == [condenser.kv_bytes(full), condenser.kv_bytes(soft_one)]


def test_an_answer_from_soft_tokens_names_the_compressor_that_makes_them(served: ServedModel) -> None:
    text = TEXTS[3]
    [got] = answered(
        served, [AnswerRequest(text=text, question=QUESTION, way="soft", method="select", max_new_tokens=8)]
    )
    condenser = served.condensers["select"]
    soft = condenser.compress(text, 4, question=QUESTION)
    assert (got["method"], got["positions"]) == ("select", len(soft))
    assert got["answer"] == condenser.generate(soft, QUESTION, max_new_tokens=8)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (CompressRequest(text="a", ratio=4), "ratio: got 4, more than the text's 1 tokens"),
        (CompressRequest(text=PROSE[:300], ratio=3), "ratio: got 3, expected one of 2, 4, 8, 16, 32"),
        (CompressRequest(text=PROSE[:300], method="mixed"), "method: got 'mixed', expected one of pool, mean"),
        (CompressRequest(text=PROSE[:300], question="?"), "question: the method 'pool' reads none"),
        (CompressRequest(text=PROSE[:300], max_soft_tokens=1), "max_soft_tokens: got 1 for a text of"),
        (PruneRequest(text=PROSE[:300], method="kvzap:/etc/passwd"), "method: got 'kvzap:/etc/passwd'"),
        (PruneRequest(text=PROSE[:300], method="qfilter:x"), "method: got 'qfilter:x'"),
        (PruneRequest(text=PROSE[:300], method="adakv(" * 4 + "snapkv" + ")" * 4), "in at most 3 wrappers"),
        (PruneRequest(text=PROSE[:300], method="snapkv("), "method: got 'snapkv\\('"),
        (PruneRequest(text=PROSE[:300], keep=0.001, method="snapkv"), "SnapKV"),
        (PruneRequest(text=PROSE * 9), "text: .* the model has 4,096 positions"),
        (AnswerRequest(text=PROSE * 9, question="?"), "text: .* the model has 4,096 positions"),
        (AnswerRequest(text=PROSE[:300], question="?", way="soft", ratio=3), "ratio: got 3"),
        (
            AnswerRequest(text=PROSE[:300], question="?", way="soft", method="mixed"),
            "method: got 'mixed', expected one",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(served: ServedModel, request_: Request, message: str) -> None:
    async def main() -> None:
        async with CompressionEngine(served) as engine:
            with pytest.raises(InvalidRequest, match=message):
                await engine.submit(request_)

    asyncio.run(main())


def test_a_server_offers_what_it_was_told_to(served: ServedModel) -> None:
    some = ServedModel.load(embedded_model_path(), ["select", "pool"], device="cpu", prunes=False, answers=False)
    assert (some.default_method, list(some.condensers)) == ("select", ["select", "pool"])
    assert not some.facts()["prunes"]
    for request in (PruneRequest(text="text"), AnswerRequest(text="text", question="?")):
        with pytest.raises(InvalidRequest, match="this server"):
            some.prepare(request)
    with pytest.raises(ValueError, match="methods: got 'zip'"):
        ServedModel.load(embedded_model_path(), ["zip"])
    with pytest.raises(ValueError, match="over different models"):
        ServedModel([Condenser.from_pretrained(embedded_model_path()), served.condensers["select"]])
    with pytest.raises(ValueError, match="expected at least one"):
        ServedModel([])


def test_seconds_are_told_by_stage(served: ServedModel) -> None:
    prepared = served.prepare(CompressRequest(text=TEXTS[3], ratio=4))
    result = served.run([prepared])
    assert set(result.stages) == {"encode", "pool", "project"}
    assert all(seconds > 0 for seconds in result.stages.values())
    assert result.stages["encode"] > result.stages["pool"]


def test_compiled_encoders_are_compiled_in_the_warm_up(served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """With adapters that were merged, and on the thread that serves; no request compiles again."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compile_layers = Encoder.compile_layers
    monkeypatch.setattr(Encoder, "compile_layers", lambda self, mode: compile_layers(self, mode, backend=counter))
    torch._dynamo.reset()
    made = ServedModel.load(embedded_model_path(), ["pool", "select"], device="cpu", compile_encoder="default")
    threads, run = set(), made.run
    monkeypatch.setattr(made, "run", lambda batch: threads.add(threading.current_thread().name) or run(batch))
    warm = []
    warm_up = made.warm_up

    def watched() -> Any:
        yield from warm_up()
        warm.append(counter.frame_count)

    monkeypatch.setattr(made, "warm_up", watched)
    requests: list[Request] = [CompressRequest(text=text, ratio=4, method="pool") for text in TEXTS]
    for text, soft in zip(TEXTS, answered(made, requests), strict=True):
        expected = served.condensers["pool"].compress(text, 4).embeds
        torch.testing.assert_close(soft.embeds, expected, atol=1e-4, rtol=1e-4)  # fp32; operations may be fused
    assert threads == {"condense-device"}
    assert warm == [counter.frame_count]
    assert warm[0] >= 1


def test_an_unknown_mode_of_compilation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^compile_encoder: got 'fast', expected one of default, "):
        ServedModel.load("nowhere", compile_encoder="fast")
    with pytest.raises(ValueError, match=r"^compile_encoder: got 'fast', expected one of default, "):
        EngineSpec(compile_encoder="fast")
