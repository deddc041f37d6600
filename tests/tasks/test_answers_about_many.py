"""Many contexts with the same questions, side by side: the answers and losses of whole prompts, one by one."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from condense_core.compressor.condenser import Condenser, Context
from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.decoder.embedded import embedded_model_path
from condense_core.tasks import answers as module
from condense_core.tasks import shared_prompts
from condense_core.tasks.answers import Answers, answer_loss, answers_about_many
from condense_core.tasks.generators import Task, TaskConfig, Turn, make_task
from condense_core.tasks.sources import ProseWriter

# fp32 losses of some five nats; sums over prompts are cut and padded in other places.
TOLERANCE = 1e-4
NEW = 8


@pytest.fixture(scope="module")
def task() -> Task:
    config = TaskConfig(min_chars=900, max_chars=1000, num_facts=4, num_questions=4)
    made = make_task("question", ProseWriter(), seed=4, config=config)
    longer = replace(
        made.turns[1], question=f"Here is a question behind many words of no use to you. {made.turns[1].question}"
    )
    return replace(made, turns=(made.turns[0], longer, *made.turns[2:]))


@pytest.fixture(scope="module", params=["random", "embedded"])
def condenser(request: pytest.FixtureRequest, tiny_condenser: Condenser) -> Condenser:
    if request.param == "random":
        return tiny_condenser
    return Condenser.from_pretrained(embedded_model_path(), method="pool", device="cpu")


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking one by one fails: what passes has not fallen back to it."""

    def one_by_one(*_: Any, **__: Any) -> Answers:
        raise AssertionError("asked one by one")

    monkeypatch.setattr(module, "answers_from_each", one_by_one)


def varied(soft: SoftTokens, count: int, *, noise: float = 0.2) -> list[SoftTokens]:
    """Soft tokens as of several miners: alike, and none the same."""
    made = []
    for seed in range(count):
        drawn = torch.randn(soft.embeds.shape, generator=torch.Generator().manual_seed(seed))
        made.append(replace(soft, embeds=soft.embeds + noise * soft.embeds.std() * drawn))
    return made


def whole(condenser: Condenser, context: Context, turns: Sequence[Turn]) -> tuple[list[str], list[float]]:
    """Every prompt by itself."""
    texts = [str(condenser.generate(context, turn.question, max_new_tokens=NEW)) for turn in turns]
    return texts, [answer_loss(condenser, context, turn.question, turn.answer) for turn in turns]


def check(condenser: Condenser, contexts: Sequence[Context], turns: Sequence[Turn], found: Sequence[Answers]) -> None:
    assert len(found) == len(contexts)
    for context, one in zip(contexts, found, strict=True):
        texts, losses = whole(condenser, context, turns)
        assert one.texts == texts
        assert one.losses == pytest.approx(losses, abs=TOLERANCE)


@pytest.mark.usefixtures("refused")
def test_each_context_gives_what_its_whole_prompts_give(condenser: Condenser, task: Task) -> None:
    """Of several lengths, with the text itself and nothing between them."""
    by_four, by_eight = (varied(condenser.compress(task.context, ratio), 3) for ratio in (4, 8))
    contexts = [by_four[0], by_eight[0], task.context, by_four[1], "", *by_eight[1:], by_four[2]]
    check(condenser, contexts, task.turns, answers_about_many(condenser, contexts, task.turns, NEW))


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize("turns", [slice(1), slice(1, 2), slice(2)])
@pytest.mark.parametrize("count", [1, 3])
def test_few_contexts_and_few_questions(turns: slice, count: int, tiny_condenser: Condenser, task: Task) -> None:
    contexts = varied(tiny_condenser.compress(task.context, 8), count)
    check(
        tiny_condenser,
        contexts,
        task.turns[turns],
        answers_about_many(tiny_condenser, contexts, task.turns[turns], NEW),
    )


@pytest.mark.usefixtures("refused")
def test_the_other_contexts_and_their_order_do_not_matter(condenser: Condenser, task: Task) -> None:
    contexts = varied(condenser.compress(task.context, 4), 12, noise=1.0)
    alone = [answers_about_many(condenser, [context], task.turns, NEW)[0] for context in contexts]
    order = random.Random(0).sample(range(12), 12)
    together = answers_about_many(condenser, [contexts[i] for i in order], task.turns, NEW)
    for place, i in enumerate(order):
        assert together[place].texts == alone[i].texts
        assert together[place].losses == pytest.approx(alone[i].losses, abs=TOLERANCE)


def test_no_contexts_are_no_answers(tiny_condenser: Condenser, task: Task) -> None:
    assert answers_about_many(tiny_condenser, [], task.turns, NEW) == []


@pytest.mark.usefixtures("refused")
def test_payloads_of_three_dtypes_are_read_as_the_model_s_own(tiny_condenser: Condenser, task: Task) -> None:
    soft = tiny_condenser.compress(task.context, 8)
    contexts = [soft.to(dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)]
    check(tiny_condenser, contexts, task.turns, answers_about_many(tiny_condenser, contexts, task.turns, NEW))


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_hostile_rows_do_not_disturb_others(dtype: torch.dtype, tiny_model_path: Path, task: Task) -> None:
    """Values at the end of float32 become infinities in float16, and NaN behind the first norm."""
    condenser = Condenser.from_pretrained(tiny_model_path, device="cpu", dtype=dtype)
    good = varied(condenser.compress(task.context, 8).to(dtype=torch.float32), 3)
    huge = replace(good[0], embeds=torch.full_like(good[0].embeds, torch.finfo(torch.float32).max))
    zero = replace(good[0], embeds=torch.zeros_like(good[0].embeds))
    one_row = replace(good[0], embeds=torch.cat([huge.embeds[:1], good[0].embeds[1:]]))
    harmless = answers_about_many(condenser, [good[0], zero, good[1], zero, zero, good[2]], task.turns, NEW)
    found = answers_about_many(condenser, [good[0], huge, good[1], one_row, zero, good[2]], task.turns, NEW)
    for place in (0, 2, 4, 5):
        assert found[place] == replace(harmless[place], ms=found[place].ms)  # to the last bit
    if dtype == torch.float16:
        assert all(loss != loss for place in (1, 3) for loss in found[place].losses)


def out_of_memory_above(most: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batches of more than ``most`` contexts do not fit; returns the sizes that are tried."""
    tried: list[int] = []
    own = module.branches_behind

    def read(model: PreTrainedModel, embeds: torch.Tensor) -> Any:
        tried.append(len(embeds))
        if len(embeds) > most:
            raise torch.OutOfMemoryError("out of memory")
        return own(model, embeds)

    monkeypatch.setattr(module, "branches_behind", read)
    return tried


@pytest.mark.usefixtures("refused")
def test_a_batch_that_runs_out_of_memory_is_halved(
    tiny_condenser: Condenser, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts = varied(tiny_condenser.compress(task.context, 8), 7)
    monkeypatch.setattr(module, "contexts_at_once", lambda *_: 5)
    tried = out_of_memory_above(2, monkeypatch)
    check(tiny_condenser, contexts, task.turns, answers_about_many(tiny_condenser, contexts, task.turns, NEW))
    assert tried == [5, 3, 2, 2, 2, 1]
    out_of_memory_above(0, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        answers_about_many(tiny_condenser, contexts, task.turns, NEW)


@pytest.mark.usefixtures("refused")
def test_contexts_are_read_side_by_side_as_far_as_bytes_allow(
    tiny_condenser: Condenser, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts = varied(tiny_condenser.compress(task.context, 8), 6)
    tried = out_of_memory_above(6, monkeypatch)
    whole_batch = answers_about_many(tiny_condenser, contexts, task.turns, NEW)
    assert tried == [6]
    monkeypatch.setattr(shared_prompts, "_MAX_BYTES_CPU", 1)
    tried.clear()
    split = answers_about_many(tiny_condenser, contexts, task.turns, NEW)
    assert tried == [1] * 6
    for one, other in zip(split, whole_batch, strict=True):
        assert one.texts == other.texts
        assert one.losses == pytest.approx(other.losses, abs=TOLERANCE)


def test_the_bound_counts_what_a_batch_holds() -> None:
    """Mistral-7B with 400 positions of context and four questions of 30 tokens: by hand, in bf16."""
    from transformers import MistralConfig, MistralForCausalLM

    with torch.device("meta"):
        model = MistralForCausalLM(MistralConfig(dtype="bfloat16")).to(torch.bfloat16)
    token = 32 * 8 * 128 * 2 * 2  # layers, key-value heads, head_dim, keys and values, bytes
    row = 54 * token + 3 * 4 * 32 * 54 * 454 + 6 * 32000 * 2
    expected = 2 * 2**30 // (400 * token + 4 * row)
    assert shared_prompts.contexts_at_once(model, 400, [[0] * 30] * 4, [[0] * 6] * 4, 24) == expected > 10


@pytest.mark.parametrize(
    ("window", "penalty"),
    [(100, 1.0), (None, 1.3)],
    ids=["a window too short", "a generation that looks at the prompt"],
)
@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`")
def test_a_model_that_does_not_allow_it_reads_one_by_one(
    window: int | None,
    penalty: float,
    build_model: Callable[..., PreTrainedModel],
    tiny_condenser: Condenser,
    task: Task,
) -> None:
    tokenizer = tiny_condenser.tokenizer
    model = build_model("mistral", vocab_size=len(tokenizer), max_position_embeddings=4096, sliding_window=window)
    model.generation_config.repetition_penalty = penalty
    condenser = Condenser(model, tokenizer, method="select")
    contexts = varied(condenser.compress(task.context, 2, question=task.turns[0].question), 2)
    check(condenser, contexts, task.turns, answers_about_many(condenser, contexts, task.turns, NEW))
