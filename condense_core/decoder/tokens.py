"""Texts to token ids, where the tokens that control a chat act in what a template writes and nowhere else.

A tokenizer looks for its added tokens in everything that it is given, so a document that spells out the end of a turn
would end it. Here a prompt is a list of spans, and a control token acts only in a span of the template. It is an added
token that is registered as special, or that the chat template spells out; others, such as runs of spaces that a
tokenizer joins, are what any text may hold.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Span:
    """A piece of a prompt. acts: whether control tokens spelled out in it are meant, as in what a template writes."""

    text: str
    acts: bool


@dataclass(frozen=True)
class _Plain:
    """A backend of our own beside a tokenizer's, in which no control token can be spelled.

    backend: knows each control token by a name that nobody can guess instead of its own. names: those names by the
    token. ids: what the backend's ids of added tokens are in the tokenizer. spelled: finds control tokens in a text.
    """

    backend: Tokenizer
    names: dict[str, str]
    ids: dict[int, int]
    spelled: re.Pattern[str] | None
    controls: frozenset[int]


_lock = Lock()
_plain: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Any, _Plain]] = WeakKeyDictionary()


def encode_spans(tokenizer: PreTrainedTokenizerBase, spans: Sequence[Span]) -> list[int]:
    """Token ids of the joined text of ``spans``, without a BOS.

    They are those of plain encoding where no text spells a control token. The tokenizer is read, never switched:
    threads may encode and render at the same time.
    """
    spans = [span for span in spans if span.text]
    if not spans:
        return []
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return _encode_slowly(tokenizer, spans)
    plain = _plain_of(tokenizer)
    whole = "".join(_renamed(span.text, plain) if span.acts else span.text for span in spans)
    ids = plain.backend.encode(whole, add_special_tokens=False).ids
    if any(i in plain.controls and i not in plain.ids for i in ids):  # its vocabulary has them as plain words too
        pieces = [plain.backend.encode(piece, add_special_tokens=False) for piece in _cut_controls(spans, plain)]
        ids = [i for piece in pieces for i in piece.ids]
    return [plain.ids.get(i, i) for i in ids]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text alone, in which nothing acts."""
    return encode_spans(tokenizer, [Span(text, False)])


def encode_with_offsets(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a text alone, as ``encode_text`` gives them, and for each its characters ``[start, stop)`` in it.

    Characters that a tokenizer drops belong to no token; where one takes several tokens, each of them has it. For
    tokenizers in Python, which know no offsets, each token is looked for behind the one before it.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return _offsets_by_search(tokenizer, text)
    plain = _plain_of(tokenizer)
    pieces = [text]
    whole = plain.backend.encode(text, add_special_tokens=False) if text else None
    if whole is None:
        return [], []
    encoded = [whole]
    if any(i in plain.controls and i not in plain.ids for i in whole.ids):
        pieces = _cut_controls([Span(text, False)], plain)
        encoded = [plain.backend.encode(piece, add_special_tokens=False) for piece in pieces]
    ids, offsets, at = [], [], 0
    for piece, found in zip(pieces, encoded, strict=True):
        ids += [plain.ids.get(i, i) for i in found.ids]
        offsets += [(at + start, at + stop) for start, stop in found.offsets]
        at += len(piece)
    return ids, offsets


def _offsets_by_search(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    ids = encode_text(tokenizer, text)
    offsets, at = [], 0
    for i in ids:
        piece = str(tokenizer.decode([i])).strip()
        found = text.find(piece, at, at + len(piece) + 8) if piece else -1  # behind some spaces at most
        start, stop = (at, at) if found < 0 else (found, found + len(piece))
        offsets.append((start, stop))
        at = stop
    return ids, offsets


def encode_behind_text(tokenizer: PreTrainedTokenizerBase, spans: Sequence[Span]) -> list[int]:
    """As ``encode_spans``, for spans that continue a text.

    A tokenizer that begins every text with a space of its own does not do so here.
    """
    letter = encode_text(tokenizer, "a")
    ids = encode_spans(tokenizer, [Span("a", False), *spans])
    return ids[len(letter) :] if ids[: len(letter)] == letter else encode_spans(tokenizer, spans)


def _renamed(text: str, plain: _Plain) -> str:
    return text if plain.spelled is None else plain.spelled.sub(lambda found: plain.names[found[0]], text)


def _cut_controls(spans: Sequence[Span], plain: _Plain) -> list[str]:
    """The joined text in pieces, cut inside every control token that a text spells."""
    assert plain.spelled is not None
    pieces = [""]
    for span in spans:
        if span.acts:
            pieces[-1] += _renamed(span.text, plain)
            continue
        start = 0
        for found in plain.spelled.finditer(span.text):
            pieces[-1] += span.text[start : found.start() + 1]
            pieces.append("")
            start = found.start() + 1
        pieces[-1] += span.text[start:]
    return [piece for piece in pieces if piece]


def _encode_slowly(tokenizer: PreTrainedTokenizerBase, spans: Sequence[Span]) -> list[int]:
    """For tokenizers in Python, which take the choice as an argument; span by span."""
    ids: list[int] = []
    for span in spans:
        given: Any = tokenizer(span.text, add_special_tokens=False, split_special_tokens=not span.acts, verbose=False)
        ids += given["input_ids"]
    return ids


def _plain_of(tokenizer: PreTrainedTokenizerBase) -> _Plain:
    """The plain backend of ``tokenizer``, made anew where tokens were added or its chat template was changed."""
    backend: Tokenizer = tokenizer.backend_tokenizer
    added = backend.get_added_tokens_decoder()
    template = tokenizer.chat_template or ""
    templates = " ".join(map(str, template.values())) if isinstance(template, dict) else str(template)
    state = (id(backend), templates, tuple((i, token.content, token.special) for i, token in added.items()))
    with _lock:
        found = _plain.get(tokenizer)
        if found is None or found[0] != state:
            found = _plain[tokenizer] = (state, _made(backend, added, templates))
    return found[1]


def _made(backend: Tokenizer, added: dict[int, AddedToken], templates: str) -> _Plain:
    plain = Tokenizer(backend.model)  # shares the vocabulary, which can be large
    if backend.normalizer is not None:
        plain.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        plain.pre_tokenizer = backend.pre_tokenizer
    names: dict[str, str] = {}
    originals: dict[str, int] = {}
    controls = set()
    for i, token in sorted(added.items()):
        content = token.content
        if not content:
            continue
        if token.special or (content.strip() and content in templates):
            names[content] = f"\ue000{uuid.uuid4().hex}\ue001"
            controls.add(i)
        name = names.get(content, content)
        originals[name] = i
        flags = {flag: getattr(token, flag) for flag in ("single_word", "lstrip", "rstrip", "normalized")}
        copy = AddedToken(name, special=content in names, **flags)
        if content in names:
            plain.add_special_tokens([copy])
        else:
            plain.add_tokens([copy])
    ids = {int(plain.token_to_id(name) or 0): i for name, i in originals.items()}
    longest_first = sorted(names, key=len, reverse=True)
    spelled = re.compile("|".join(map(re.escape, longest_first))) if names else None
    return _Plain(plain, names, ids, spelled, frozenset(controls))
