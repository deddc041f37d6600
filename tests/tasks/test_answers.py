"""All questions about a context in one batch: the answers and losses of asking one by one, from less work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from condense_core.compressor.condenser import Condenser
from condense_core.decoder.embedded import embedded_model_path
from condense_core.pruning import AdaKV, KVzip, Method, PyramidKV, Random, SnapKV
from condense_core.pruning.text import answer_loss as loss_behind_cache
from condense_core.pruning.text import ask, prefill, question_ids
from condense_core.tasks import answers as module
from condense_core.tasks import shared_prompts
from condense_core.tasks.answers import Answers, answer_ids, answer_loss, answers_about, answers_from_cache
from condense_core.tasks.generators import Task, TaskConfig, Turn, make_task
from condense_core.tasks.sources import ProseWriter

# fp32 losses of some five nats; the context and the rest are read in two passes instead of one.
TOLERANCE = 1e-4
NEW = 8


@pytest.fixture(scope="module")
def task() -> Task:
    config = TaskConfig(min_chars=900, max_chars=1000, num_facts=6, num_questions=6)
    return make_task("question", ProseWriter(), seed=4, config=config)


@pytest.fixture(scope="module", params=["random", "embedded"])
def condenser(request: pytest.FixtureRequest, tiny_condenser: Condenser) -> Condenser:
    return (
        tiny_condenser if request.param == "random" else Condenser.from_pretrained(embedded_model_path(), device="cpu")
    )


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking one by one fails: what passes has not fallen back to it."""

    def one_by_one(*_: Any, **__: Any) -> Answers:
        raise AssertionError("asked one by one")

    monkeypatch.setattr(module, "answers_from_each", one_by_one)
    monkeypatch.setattr(module, "ask", one_by_one)


def plain(condenser: Condenser, context: Any, turns: tuple[Turn, ...]) -> tuple[list[str], list[float]]:
    """Every prompt by itself."""
    texts = [str(condenser.generate(context, turn.question, max_new_tokens=NEW)) for turn in turns]
    return texts, [answer_loss(condenser, context, turn.question, turn.answer) for turn in turns]


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize("context", ["full", "soft", "none"])
def test_the_batch_gives_what_single_prompts_give(context: str, condenser: Condenser, task: Task) -> None:
    given = {"full": task.context, "none": "", "soft": condenser.compress(task.context, 4)}[context]
    found = answers_about(condenser, given, task.turns, NEW)
    texts, losses = plain(condenser, given, task.turns)
    assert found.texts == texts
    assert found.losses == pytest.approx(losses, abs=TOLERANCE)
    assert found.ms > 0


METHODS = [Random(keep=1.0), SnapKV(keep=0.5, window=8), AdaKV(SnapKV(keep=0.5, window=8)), PyramidKV(SnapKV(keep=0.5))]


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize("method", [*METHODS, KVzip(keep=0.5)], ids=["full", "snapkv", "adakv", "pyramidkv", "kvzip"])
def test_the_batch_gives_what_single_questions_to_a_cache_give(
    method: Method, condenser: Condenser, task: Task
) -> None:
    model, tokenizer = condenser.model, condenser.tokenizer
    cache = prefill(model, tokenizer, task.context, method)
    found = answers_from_cache(condenser, cache, task.turns, NEW)
    assert found.texts == [ask(model, tokenizer, cache, turn.question, max_new_tokens=NEW) for turn in task.turns]
    losses = [
        loss_behind_cache(
            model, cache, question_ids(tokenizer, turn.question), answer_ids(tokenizer, turn.question, turn.answer)
        )
        for turn in task.turns
    ]
    assert found.losses == pytest.approx(losses, abs=TOLERANCE)


@pytest.fixture
def tokens_read(tiny_condenser: Condenser) -> Iterator[list[int]]:
    """Tokens that the model is given, pass by pass."""
    counts: list[int] = []

    def count(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        given = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        counts.append(given.shape[0] * given.shape[1])

    handle = tiny_condenser.model.model.register_forward_pre_hook(count, with_kwargs=True)
    yield counts
    handle.remove()


def test_the_context_is_read_once(tiny_condenser: Condenser, task: Task, tokens_read: list[int]) -> None:
    length = len(tiny_condenser.encode(task.context))
    answers_about(tiny_condenser, task.context, task.turns, NEW)  # and the check of the model, if this is its first use
    tokens_read.clear()
    answers_about(tiny_condenser, task.context, task.turns, NEW)
    assert length < sum(tokens_read) < 2.5 * length
    tokens_read.clear()
    plain(tiny_condenser, task.context, task.turns)
    assert sum(tokens_read) > 12 * length


@pytest.mark.usefixtures("refused")
def test_a_batch_takes_no_more_memory_than_allowed(
    tiny_condenser: Condenser, task: Task, monkeypatch: pytest.MonkeyPatch, tokens_read: list[int]
) -> None:
    whole = answers_about(tiny_condenser, task.context, task.turns, NEW)
    monkeypatch.setattr(shared_prompts, "_MAX_WEIGHTS", 1)
    tokens_read.clear()
    split = answers_about(tiny_condenser, task.context, task.turns, NEW)
    assert tokens_read.count(1) >= 6  # a step of each question by itself
    assert split.texts == whole.texts
    assert split.losses == pytest.approx(whole.losses, abs=TOLERANCE)


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize("context", ["full", "none"])
def test_one_question_and_the_same_question_twice(context: str, tiny_condenser: Condenser, task: Task) -> None:
    given = task.context if context == "full" else ""
    turn = task.turns[0]
    texts, losses = plain(tiny_condenser, given, (turn,))
    for times in (1, 2):
        found = answers_about(tiny_condenser, given, (turn,) * times, NEW)
        assert found.texts == texts * times
        assert found.losses == pytest.approx(losses * times, abs=TOLERANCE)


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`")
@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"config": {"sliding_window": 100}}, id="a window shorter than the prompt"),
        pytest.param({"generation": {"repetition_penalty": 1.3}}, id="a generation that looks at the prompt"),
    ],
)
def test_what_cannot_be_a_batch_is_asked_one_by_one(
    change: dict[str, dict[str, Any]],
    build_model: Callable[..., PreTrainedModel],
    tiny_condenser: Condenser,
    task: Task,
) -> None:
    tokenizer = tiny_condenser.tokenizer
    settings = {"vocab_size": len(tokenizer), "max_position_embeddings": 4096}
    model = build_model("mistral", **settings, **change.get("config", {}))
    for name, value in change.get("generation", {}).items():
        setattr(model.generation_config, name, value)
    condenser = Condenser(model, tokenizer, method="select")
    found = answers_about(condenser, task.context, task.turns, NEW)
    questions = [turn.question for turn in task.turns]
    assert found.texts == condenser.generate([task.context] * 6, questions, max_new_tokens=NEW)
    assert found.losses == [answer_loss(condenser, task.context, turn.question, turn.answer) for turn in task.turns]
    cache = prefill(model, tokenizer, task.context, SnapKV(keep=0.5, window=8))
    from_cache = answers_from_cache(condenser, cache, task.turns, NEW)
    assert from_cache.texts == [ask(model, tokenizer, cache, turn.question, max_new_tokens=NEW) for turn in task.turns]


def test_a_prompt_without_room_is_refused(tiny_condenser: Condenser, task: Task) -> None:
    with pytest.raises(ValueError, match=r"prompt: .* with its context and up to 5,000 new tokens"):
        answers_about(tiny_condenser, task.context, task.turns, 5000)
    cache = prefill(tiny_condenser.model, tiny_condenser.tokenizer, task.context, SnapKV(keep=0.5, window=8))
    with pytest.raises(ValueError, match=r"question: .* with the context before it and up to 5,000 new tokens"):
        answers_from_cache(tiny_condenser, cache, task.turns, 5000)


@torch.no_grad()
def test_prompt_parts_are_what_a_prompt_embeds(tiny_condenser: Condenser, task: Task) -> None:
    soft = tiny_condenser.compress(task.context, 8)
    for context in (task.context, soft, "", ["A text.", soft]):
        parts = tiny_condenser.prompt_parts(context, "Why?")
        embeds = tiny_condenser.prepare(context, "Why?")["inputs_embeds"]
        assert torch.equal(tiny_condenser.embed_parts(parts), embeds[0])
