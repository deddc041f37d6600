"""How well a model answers from soft tokens, beside its full context and none: accuracy, losses, sizes and times."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from condense_core.compressor.condenser import Condenser, Context
from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.decoder.prompt import render
from condense_core.tasks.generators import Task, Turn
from condense_core.tasks.metrics import exact_match, recovered, token_f1


@dataclass(frozen=True)
class EvalRow:
    """One way to give the context; ``ratio`` 0 stands for the controls ``full`` and ``none``.

    accuracy, f1: means over the questions, in [0, 1]. loss: nats per answer token. recovered: share of the context's
    worth, see ``metrics.recovered``. positions: mean positions the context takes in the decoder. compress_ms: median
    time to compress one context. answer_ms: mean time to answer one question, prefill included. by_kind: accuracy per
    kind.
    """

    method: str
    ratio: int
    accuracy: float
    f1: float
    loss: float
    recovered: float
    positions: float
    compress_ms: float
    answer_ms: float
    num_questions: int
    by_kind: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Tally:
    """What is counted for one way to give the context, question by question."""

    matches: list[float] = field(default_factory=list)
    f1: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    answer_ms: list[float] = field(default_factory=list)
    by_kind: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    positions: list[int] = field(default_factory=list)
    compress_ms: list[float] = field(default_factory=list)

    def add(self, turn: Turn, answer: str, loss: float) -> None:
        """Count the answer to one question."""
        match = exact_match(answer, turn.answer)
        self.matches.append(match)
        self.by_kind[turn.kind].append(match)
        self.f1.append(token_f1(answer, turn.answer))
        self.losses.append(loss)

    def scores(self, loss_none: float, loss_full: float) -> dict[str, Any]:
        """The fields that the rows of all evaluations have, given the losses of the controls."""
        mean = statistics.fmean
        loss = mean(self.losses)
        return {
            "accuracy": mean(self.matches),
            "f1": mean(self.f1),
            "loss": loss,
            "recovered": recovered(loss_none, loss, loss_full),
            "answer_ms": mean(self.answer_ms),
            "num_questions": len(self.matches),
            "by_kind": {kind: mean(matches) for kind, matches in sorted(self.by_kind.items())},
        }

    def loss(self) -> float:
        """Mean loss; NaN before the first question."""
        return statistics.fmean(self.losses) if self.losses else float("nan")


def evaluate(
    condensers: dict[str, Condenser],
    tasks: Iterable[Task],
    *,
    ratios: Sequence[int],
    controls: bool = True,
    max_new_tokens: int = 16,
    progress: Callable[[], None] | None = None,
) -> list[EvalRow]:
    """Ask every question of ``tasks`` with each method at each ratio; ``full`` and ``none`` first.

    condensers: by method, over the same decoder. progress: called once per task. ``ValueError`` where there is no task.
    """
    if not condensers:
        raise ValueError("condensers: empty; expected at least one")
    reference = next(iter(condensers.values()))
    tallies: dict[tuple[str, int], Tally] = {}
    for task in tasks:
        if controls:
            _ask(tallies.setdefault(("full", 0), Tally()), reference, task.context, task, max_new_tokens)
            _ask(tallies.setdefault(("none", 0), Tally()), reference, "", task, max_new_tokens)
        for method, condenser in condensers.items():
            for ratio in ratios:
                tally = tallies.setdefault((method, ratio), Tally())
                started = time.perf_counter()
                soft = condenser.compress(task.context, ratio)
                synchronize(condenser)
                tally.compress_ms.append((time.perf_counter() - started) * 1e3)
                _ask(tally, condenser, soft, task, max_new_tokens)
        if progress:
            progress()
    if not tallies:
        raise ValueError("tasks: empty; expected at least one")
    none, full = (tallies[key, 0].loss() if (key, 0) in tallies else float("nan") for key in ("none", "full"))
    return [
        EvalRow(
            method=method,
            ratio=ratio,
            positions=statistics.fmean(tally.positions),
            compress_ms=statistics.median(tally.compress_ms) if tally.compress_ms else 0.0,
            **tally.scores(none, full),
        )
        for (method, ratio), tally in tallies.items()
    ]


def synchronize(condenser: Condenser) -> None:
    """Wait for the device: a time taken now is of finished work."""
    if condenser.device.type == "cuda":
        torch.cuda.synchronize(condenser.device)


def _ask(tally: Tally, condenser: Condenser, context: Context, task: Task, max_new_tokens: int) -> None:
    questions = [turn.question for turn in task.turns]
    started = time.perf_counter()
    answers = condenser.generate([context] * len(questions), questions, max_new_tokens=max_new_tokens)
    tally.answer_ms.append((time.perf_counter() - started) * 1e3 / len(questions))
    for turn, answer in zip(task.turns, answers, strict=True):
        tally.add(turn, answer, answer_loss(condenser, context, turn.question, turn.answer))
    if isinstance(context, SoftTokens):
        tally.positions.append(len(context))
    else:
        tally.positions.append(len(condenser.encode(context)) if context else 0)


@torch.inference_mode()
def answer_loss(condenser: Condenser, context: Context | Sequence[Context], prompt: str, answer: str) -> float:
    """Mean negative log-likelihood of ``answer`` (and the end of the turn) behind the prompt, in nats per token."""
    prefix = condenser.prepare(context, prompt)["inputs_embeds"]
    ids = torch.tensor([answer_ids(condenser.tokenizer, prompt, answer)], device=prefix.device)
    embeds = torch.cat([prefix, condenser.model.get_input_embeddings()(ids)], 1)
    logits = condenser.model(inputs_embeds=embeds, use_cache=False, logits_to_keep=ids.shape[1] + 1).logits
    return float(F.cross_entropy(logits[0, :-1].float(), ids[0]))


def answer_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> list[int]:
    """Token ids of ``answer`` as the chat template writes an assistant's turn behind ``prompt``."""
    before = render(tokenizer, prompt)
    written = f"{answer}{tokenizer.eos_token or ''}"  # behind the line break that ends a prompt without template
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        whole = str(tokenizer.apply_chat_template(chat, tokenize=False))
        if whole.startswith(before):
            written = whole.removeprefix(before)
    ids: list[int] = tokenizer(written, add_special_tokens=False)["input_ids"]
    return ids
