"""Batches of (context, conversation about it), built at token level so that no row needs padding inside.

A row is the chat template's opening, the context, and a tail: an empty line, a question, the answer, and perhaps
further turns. Several turns about one context make the supervision dense. The same batch serves the LM (context as
tokens) and a compressor (context as soft tokens), because both only replace the middle of the row.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from condense_core.decoder.prompt import SEPARATOR
from condense_core.tasks.facts import Split, draw_facts
from condense_core.tasks.generators import CONTINUE_PROMPT, REPEAT_PROMPT
from condense_core.training.store import SentenceStore, encode_pieces


@dataclass(frozen=True)
class Batch:
    """Rows of one shape, on one device.

    Attributes:
        prefix: token ids ``[P]``, the same before every context.
        context: token ids ``[B, C]``.
        tail: token ids ``[B, T]`` behind the context; a row is padded behind its last answer with the end-of-sequence
            token.
        tail_mask: bool ``[B, T]``, true where the tail is an answer to learn.
        task: what is asked: ``question``, ``reconstruction``, ``continuation`` or ``text``.
        answer_places: int64 ``[M]``, where ``tail_mask`` is true in the flattened tail. Found on the host, so that no
            step waits for a device to count them.
    """

    prefix: Tensor
    context: Tensor
    tail: Tensor
    tail_mask: Tensor
    task: str
    answer_places: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "answer_places", self.tail_mask.flatten().nonzero().squeeze(1))

    @property
    def answer_ids(self) -> Tensor:
        """The tokens ``[M]`` to predict."""
        return self.tail.flatten().index_select(0, self.answer_places)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows: prefix, context and tail."""
        return self.context.numel() + self.tail.numel() + self.prefix.numel() * self.context.shape[0]

    def to(self, device: torch.device) -> Batch:
        """A copy on ``device``."""
        return self.map(lambda tensor: tensor.to(device))

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """A copy with every tensor changed."""
        changed = copy(self)
        for name in ("prefix", "context", "tail", "tail_mask", "answer_places"):
            object.__setattr__(changed, name, change(getattr(self, name)))
        return changed


class ChatFormat:
    """The strings that a tokenizer's chat template puts around and between turns, found by rendering marked turns.

    opening | context | separator question | answer_lead answer end | next_turn question | ... with ``question_end``
    before each answer. Tokens are cut where a space begins, so that pieces encode as they would together.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        def chat(*contents: str) -> str:
            roles = ("user", "assistant")
            turns = [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]
            return str(tokenizer.apply_chat_template(turns, tokenize=False))

        if tokenizer.chat_template:
            first, answer, second = "<<first>>", "<<answer>>", "<<second>>"
            self.opening, _, rest = chat(first, answer, second).partition(first)
            between, _, rest = rest.partition(answer)
            following = rest.partition(second)[0]
            self.end = chat(first, answer).partition(answer)[2]
            self.next_turn = following.removeprefix(self.end)
        else:
            self.opening, between = tokenizer.bos_token or "", "\n"
            self.end, self.next_turn = tokenizer.eos_token or "\n", "\n"
        self.opening = self.opening.rstrip(" ")
        self.question_end = between.rstrip(" ")
        self.answer_lead = between[len(self.question_end) :]


class BatchMaker:
    """Draws training batches; batch ``step`` is a function of (seed, step) alone, so a run resumes exactly."""

    def __init__(self, store: SentenceStore, tokenizer: PreTrainedTokenizerBase, *, seed: int, split: Split = "train"):
        self.store, self.tokenizer, self.seed, self.split = store, tokenizer, seed, split
        self.chat = ChatFormat(tokenizer)
        self.prefix = torch.tensor(self.encode([self.chat.opening])[0], dtype=torch.long)
        self.pad = int(tokenizer.eos_token_id)

    def encode(self, texts: list[str]) -> list[list[int]]:
        return encode_pieces(self.tokenizer, texts)

    def rng(self, step: int) -> random.Random:
        return random.Random(f"{self.seed}-{step}")

    def questions(self, rng: random.Random, *, batch: int, context: int, facts: int, turns: int) -> Batch:
        """``batch`` rows of exactly ``context`` tokens holding ``facts`` facts, ``turns`` of which are asked for."""
        rows, tails, masks = [], [], []
        for _ in range(batch):
            drawn = draw_facts(facts, rng, split=self.split, relatedness=rng.choice((0.0, 0.4, 0.8)))
            statements = self.encode([" " + fact.statement for fact in drawn])
            rows.append(self._context(rng, statements, context))
            while len(drawn) > 1 and sum(map(len, statements)) > context:  # a tokenizer with many tokens per word
                drawn.pop()
                statements.pop()
            asked = rng.sample(drawn, min(turns, len(drawn)))
            tail, mask = self._turns([(fact.question, fact.answer) for fact in asked])
            tails.append(tail)
            masks.append(mask)
        return self._batch("question", rows, tails, masks)

    def reconstruction(self, rng: random.Random, *, batch: int, context: int, length: int) -> Batch:
        """Repeat the first ``length`` tokens of the context."""
        rows = []
        for _ in range(batch):
            facts = draw_facts(max(1, context // 100), rng, split=self.split)
            rows.append(self._context(rng, self.encode([" " + fact.statement for fact in facts]), context))
        return self._instruction("reconstruction", REPEAT_PROMPT, rows, [row[:length] for row in rows])

    def continuation(self, rng: random.Random, *, batch: int, context: int, length: int) -> Batch:
        """Continue the context by ``length`` tokens, asked for as an instruction."""
        flat = [self._running(rng, context + length) for _ in range(batch)]
        rows, targets = [f[:context] for f in flat], [f[context:] for f in flat]
        return self._instruction("continuation", CONTINUE_PROMPT, rows, targets)

    def text(self, rng: random.Random, *, batch: int, context: int, length: int) -> Batch:
        """Running text without any instruction: the tail just goes on."""
        flat = [self._running(rng, context + length) for _ in range(batch)]
        return self._batch("text", [f[:context] for f in flat], [f[context:] for f in flat], [[True] * length] * batch)

    def _running(self, rng: random.Random, length: int) -> list[int]:
        sentences = self.store.sentences(rng.randrange(len(self.store)), length)
        return [token for sentence in sentences for token in sentence][:length]

    def _instruction(self, task: str, prompt: str, rows: list[list[int]], targets: list[list[int]]) -> Batch:
        asked = self.encode([f"{SEPARATOR}{prompt}{self.chat.question_end}"])[0]
        masks = [[False] * len(asked) + [True] * len(target) for target in targets]
        return self._batch(task, rows, [asked + target for target in targets], masks)

    def _context(self, rng: random.Random, statements: list[list[int]], context: int) -> list[int]:
        room = context - sum(map(len, statements))
        if room < 0:
            raise ValueError(
                f"context: got {context} tokens, too few for {len(statements)} facts; expected {-room} more"
            )
        pieces = self.store.sentences(rng.randrange(len(self.store)), room) if room else []
        places = sorted(rng.randrange(max(1, len(pieces))) for _ in statements)
        row: list[int] = []
        filler = 0
        for i, piece in enumerate(pieces or [[]]):
            for place, statement in zip(places, statements, strict=True):
                if place == i:
                    row += statement
            row += piece[: room - filler]
            filler += len(piece[: room - filler])
        return row

    def _turns(self, turns: list[tuple[str, str]]) -> tuple[list[int], list[bool]]:
        chat = self.chat
        leads = [SEPARATOR, *[chat.next_turn] * (len(turns) - 1)]
        asked = self.encode([f"{lead}{q}{chat.question_end}" for lead, (q, _) in zip(leads, turns, strict=True)])
        answers = self.encode([f"{chat.answer_lead}{a}{chat.end}" for _, a in turns])
        tail: list[int] = []
        mask: list[bool] = []
        for question, answer in zip(asked, answers, strict=True):
            tail += question + answer
            mask += [False] * len(question) + [True] * len(answer)
        return tail, mask

    def _batch(self, task: str, rows: list[list[int]], tails: list[list[int]], masks: list[list[bool]]) -> Batch:
        width = max(map(len, tails))
        tail = [t + [self.pad] * (width - len(t)) for t in tails]
        mask = [m + [False] * (width - len(m)) for m in masks]
        return Batch(self.prefix, torch.tensor(rows), torch.tensor(tail), torch.tensor(mask), task)
