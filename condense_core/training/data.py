"""Batches of (context, conversation about it), built at token level so that no row needs padding inside.

A row is the chat template's opening, the context, and a tail: an empty line, a question, the answer. Several questions
about one context make the supervision dense: they are turns of one conversation, or conversations of their own behind
the same context, which do not see each other. The same batch serves the LM (context as tokens) and a compressor
(context as soft tokens), because both only replace the middle of the row.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from condense_core.decoder.prompt import SEPARATOR
from condense_core.tasks.facts import Fact, Split
from condense_core.tasks.generators import CONTINUE_PROMPT, REPEAT_PROMPT
from condense_core.tasks.wording import draw_worded_facts
from condense_core.training.store import SentenceStore, encode_pieces

#: What is asked of a piece of the text, whose first words stand in the middle.
QUOTE_PROMPT = ('Which words follow "', '" in the text?')
#: Tokens that are given of it, and that are asked for.
QUOTE_LEAD, QUOTE_LENGTH = 8, 16


class TopLogits(NamedTuple):
    """The likeliest next tokens, as a teacher saw them: ``ids [M, K]`` int64 and ``log_probs [M, K]`` fp32, in nats."""

    ids: Tensor
    log_probs: Tensor

    def rows(self, which: slice) -> TopLogits:
        """Some of the M rows."""
        return TopLogits(self.ids[which], self.log_probs[which])


@dataclass(frozen=True)
class Batch:
    """Rows of one shape, on one device.

    Attributes:
        prefix: token ids ``[P]``, the same before every context.
        context: token ids ``[B, C]``.
        tail: token ids ``[B, T]`` behind the context; a row is padded behind its last answer with the end-of-sequence
            token.
        tail_mask: bool ``[B, T]``, true where the tail is an answer to learn.
        task: what is asked: ``question``, ``told``, ``quote``, ``reconstruction``, ``continuation`` or ``text``.
        turns: int64 ``[B, T]``, which conversation about the context a token of the tail belongs to, -1 for padding. A
            token sees the context and its own conversation, and its position is counted as if there was no other. None:
            the tail is one conversation.
        teacher: what the teacher said at the M places, if it was asked before; None: it was not.
        marks: bool ``[B, C]``, which tokens of the contexts are of a fact that was inserted, where that is known.
        answer_places: int64 ``[M]``, where ``tail_mask`` is true in the flattened tail. Found on the host, so that no
            step waits for a device to count them.
    """

    prefix: Tensor
    context: Tensor
    tail: Tensor
    tail_mask: Tensor
    task: str
    turns: Tensor | None = None
    teacher: TopLogits | None = None
    marks: Tensor | None = None
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
        for name in ("prefix", "context", "tail", "tail_mask", "turns", "marks", "answer_places"):
            if (tensor := getattr(self, name)) is not None:
                object.__setattr__(changed, name, change(tensor))
        if self.teacher is not None:
            object.__setattr__(changed, "teacher", TopLogits(*map(change, self.teacher)))
        return changed


class Context(NamedTuple):
    """Running text that holds facts: token ids, which of them are of a fact's statement, and the facts."""

    ids: list[int]
    marks: list[bool]
    facts: list[Fact]


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

    def __init__(
        self,
        store: SentenceStore,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        split: Split = "train",
        wording: str = "plain",
    ) -> None:
        """Args: store: the text. seed: of every draw. split, wording: of the facts that are inserted."""
        self.store, self.tokenizer, self.seed, self.split, self.wording = store, tokenizer, seed, split, wording
        self.chat = ChatFormat(tokenizer)
        self.prefix = torch.tensor(self.encode([self.chat.opening])[0], dtype=torch.long)
        self.pad = int(tokenizer.eos_token_id)

    @cached_property
    def sentence_ends(self) -> Tensor:
        """bool ``[V]``: the tokens that end a sentence."""
        size = max(len(self.tokenizer), int(self.tokenizer.vocab_size))
        texts = self.tokenizer.batch_decode([[i] for i in range(size)])
        return torch.tensor([text.rstrip().endswith((".", "!", "?")) or "\n" in text for text in texts])

    def encode(self, texts: list[str]) -> list[list[int]]:
        return encode_pieces(self.tokenizer, texts)

    def rng(self, step: int) -> random.Random:
        return random.Random(f"{self.seed}-{step}")

    def questions(self, rng: random.Random, *, batch: int, context: int, facts: int, turns: int) -> Batch:
        """``batch`` rows of exactly ``context`` tokens holding ``facts`` facts, ``turns`` of which are asked for."""
        rows: list[Context] = []
        tails, masks = [], []
        for _ in range(batch):
            row = self.with_facts(rng, context, facts)
            rows.append(row)
            asked = rng.sample(row.facts, min(turns, len(row.facts)))
            tail, mask = self._turns([(fact.question, fact.answer) for fact in asked])
            tails.append(tail)
            masks.append(mask)
        return self._batch("question", _ids(rows), tails, masks, marks=_marks(rows))

    def with_facts(self, rng: random.Random, context: int, facts: int) -> Context:
        """Exactly ``context`` tokens of running text that hold ``facts`` facts, or as many as there is room for."""
        relatedness = rng.choice((0.0, 0.4, 0.8))
        drawn = draw_worded_facts(self.wording, facts, rng, split=self.split, relatedness=relatedness)
        statements = self.encode([" " + fact.statement for fact in drawn])
        while len(drawn) > 1 and sum(map(len, statements)) > context:  # a tokenizer with many tokens per word
            drawn.pop()
            statements.pop()
        return Context(*self._context(rng, statements, context), drawn)

    def reconstruction(self, rng: random.Random, *, batch: int, context: int, length: int) -> Batch:
        """Repeat the first ``length`` tokens of the context."""
        rows = [self.with_facts(rng, context, max(1, context // 100)) for _ in range(batch)]
        targets = [row.ids[:length] for row in rows]
        return self._instruction("reconstruction", REPEAT_PROMPT, _ids(rows), targets, _marks(rows))

    def quotes(self, rng: random.Random, *, batch: int, context: int, quotes: int) -> Batch:
        """Go on behind the first words of ``quotes`` pieces of the context, each in a conversation of its own."""
        before, behind = self.encode([f"{SEPARATOR}{QUOTE_PROMPT[0]}", f"{QUOTE_PROMPT[1]}{self.chat.question_end}"])
        rows, conversations = [], []
        for _ in range(batch):
            row = self.with_facts(rng, context, max(1, context // 100))
            last = max(1, context - QUOTE_LEAD - QUOTE_LENGTH)
            starts = sorted(rng.randrange(last) for _ in range(quotes))
            conversations.append(
                [
                    ([*before, *row.ids[start:cut], *behind], row.ids[cut : cut + QUOTE_LENGTH])
                    for start in starts
                    if row.ids[(cut := start + QUOTE_LEAD) :]
                ]
            )
            rows.append(row)
        return self.conversations("quote", _ids(rows), conversations, _marks(rows))

    def told_facts(self, rng: random.Random, *, batch: int, context: int, facts: int) -> Batch:
        """``batch`` contexts with ``facts`` facts, each asked for in a conversation of its own, told in a sentence."""
        rows, conversations = [], []
        for _ in range(batch):
            row = self.with_facts(rng, context, facts)
            asked = self.question_ids([fact.question for fact in row.facts])
            told = [f"The {fact.attribute} of {fact.entity} is {fact.answer}.{self.chat.end}" for fact in row.facts]
            answers = self.encode([f"{self.chat.answer_lead}{sentence}" for sentence in told])
            rows.append(row)
            conversations.append(list(zip(asked, answers, strict=True)))
        return self.conversations("told", _ids(rows), conversations, _marks(rows))

    def conversations(
        self,
        task: str,
        rows: list[list[int]],
        conversations: list[list[tuple[list[int], list[int]]]],
        marks: list[list[bool]] | None = None,
    ) -> Batch:
        """Contexts ``rows`` of one length, with (question, answer) pairs of token ids that do not see each other."""
        tails, masks, turns = [], [], []
        for pairs in conversations:
            tails.append([token for question, answer in pairs for token in question + answer])
            masks.append([place >= len(q) for q, a in pairs for place in range(len(q) + len(a))])
            turns.append([turn for turn, (q, a) in enumerate(pairs) for _ in q + a])
        return self._batch(task, rows, tails, masks, turns, marks)

    def question_ids(self, questions: list[str]) -> list[list[int]]:
        """Token ids from the end of the context to the place where the answer to each question begins."""
        return self.encode([f"{SEPARATOR}{q}{self.chat.question_end}" for q in questions])

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

    def _instruction(
        self,
        task: str,
        prompt: str,
        rows: list[list[int]],
        targets: list[list[int]],
        marks: list[list[bool]] | None = None,
    ) -> Batch:
        asked = self.encode([f"{SEPARATOR}{prompt}{self.chat.question_end}"])[0]
        masks = [[False] * len(asked) + [True] * len(target) for target in targets]
        return self._batch(task, rows, [asked + target for target in targets], masks, marks=marks)

    def _context(self, rng: random.Random, statements: list[list[int]], context: int) -> tuple[list[int], list[bool]]:
        room = context - sum(map(len, statements))
        if room < 0:
            raise ValueError(
                f"context: got {context} tokens, too few for {len(statements)} facts; expected {-room} more"
            )
        pieces = self.store.sentences(rng.randrange(len(self.store)), room) if room else []
        places = sorted(rng.randrange(max(1, len(pieces))) for _ in statements)
        row: list[int] = []
        marks: list[bool] = []
        filler = 0
        for i, piece in enumerate(pieces or [[]]):
            for place, statement in zip(places, statements, strict=True):
                if place == i:
                    row += statement
                    marks += [True] * len(statement)
            piece = piece[: room - filler]
            row += piece
            marks += [False] * len(piece)
            filler += len(piece)
        return row, marks

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

    def _batch(
        self,
        task: str,
        rows: list[list[int]],
        tails: list[list[int]],
        masks: list[list[bool]],
        turns: list[list[int]] | None = None,
        marks: list[list[bool]] | None = None,
    ) -> Batch:
        width = max(map(len, tails))

        def padded(lists: list[list[int]] | list[list[bool]], value: int) -> Tensor:
            return torch.tensor([[*each, *[value] * (width - len(each))] for each in lists])

        return Batch(
            self.prefix,
            torch.tensor(rows),
            padded(tails, self.pad),
            padded(masks, False),
            task,
            turns=None if turns is None else padded(turns, -1),
            marks=None if marks is None else torch.tensor(marks),
        )


def _ids(rows: list[Context]) -> list[list[int]]:
    return [row.ids for row in rows]


def _marks(rows: list[Context]) -> list[list[bool]]:
    return [row.marks for row in rows]
