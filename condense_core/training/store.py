"""A corpus as token ids on disk: built from documents one after the other, read as runs of sentences."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

#: A piece of text longer than this is cut, at a space where there is one: what an encoder sees at once stays short.
MAX_PIECE_CHARS = 600

# Behind . ! ? : ; and white space, or behind the full stops of scripts that put no space there.
_SENTENCE_END = re.compile(r"(?<=[.!?:;])\s+|(?<=[\u3002\uff01\uff1f\uff1b\uff1a\u0964\u06d4\u1362])\s*")
_PIECES_AT_ONCE = 4096


def encode_pieces(tokenizer: PreTrainedTokenizerBase, pieces: list[str]) -> list[list[int]]:
    """Token ids of pieces of running text, each with the space or line break that leads up to it.

    SentencePiece tokenizers (Llama, Mistral) put a space before every text by themselves; there the piece's own is
    dropped, so that it is not counted twice.
    """
    backend = tokenizer.backend_tokenizer
    if backend.encode("a", add_special_tokens=False).tokens[0].startswith("\u2581"):
        pieces = [piece.removeprefix(" ") for piece in pieces]
    return [e.ids for e in backend.encode_batch(pieces, add_special_tokens=False)]


def sentence_pieces(text: str) -> Iterator[str]:
    """``text`` cut into sentences, each with the line break or space before it.

    Lines are cut behind full stops of any script; a sentence of more than ``MAX_PIECE_CHARS`` characters (code, tables,
    scripts without full stops) also at a space, or where there is none, in the middle.
    """
    for line in text.split("\n"):
        lead, line = "\n", line.strip()
        at = 0
        for end in [*_SENTENCE_END.finditer(line), None]:
            sentence = line[at : end.start() if end else len(line)]
            if sentence:
                yield from _at_most(MAX_PIECE_CHARS, sentence, lead)
                lead = ""
            if end:
                at, lead = end.end(), lead or (" " if end.group() else "")


def _at_most(limit: int, sentence: str, lead: str) -> Iterator[str]:
    while len(sentence) > limit:
        cut = sentence.rfind(" ", limit // 2, limit + 1)
        head = sentence[:cut] if cut > 0 else sentence[:limit]
        yield lead + head
        lead, sentence = (" ", sentence[cut + 1 :]) if cut > 0 else ("", sentence[limit:])
    if sentence:
        yield lead + sentence


class SentenceStore:
    """A corpus as one array of token ids with sentence boundaries.

    Both arrays lie in temporary files, which are deleted with the store; the memory that is used does not grow with the
    corpus.

    Attributes:
        ids: uint32 ``[num_tokens]``.
        offsets: int64 ``[num_sentences + 1]``; sentence i is ``ids[offsets[i]:offsets[i + 1]]``.
        digest: SHA-256 of both, in hexadecimal digits.
    """

    def __init__(self, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> None:
        """Read and encode ``texts``; ``ValueError`` where they hold no token."""
        ids, offsets = _DiskArray(np.uint32), _DiskArray(np.int64)
        offsets.append(np.zeros(1, dtype=np.int64))
        pieces = (piece for text in texts for piece in sentence_pieces(text))
        total = 0
        while batch := list(islice(pieces, _PIECES_AT_ONCE)):
            encoded = [found for found in encode_pieces(tokenizer, batch) if found]
            lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
            ids.append(np.fromiter((i for found in encoded for i in found), dtype=np.uint32, count=int(lengths.sum())))
            offsets.append(total + np.cumsum(lengths))
            total += int(lengths.sum())
        if not total:
            raise ValueError("corpus: holds no text; expected at least one document that is not empty")
        self.ids, self.offsets = ids.array(), offsets.array()
        self.digest = hashlib.sha256((ids.digest() + offsets.digest()).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def sentences(self, start: int, num_tokens: int) -> list[list[int]]:
        """Consecutive sentences from ``start`` (wrapping round) that hold at least ``num_tokens`` tokens."""
        found: list[list[int]] = []
        total = 0
        while total < num_tokens:
            i = start % len(self)
            found.append(self.ids[self.offsets[i] : self.offsets[i + 1]].tolist())
            total += len(found[-1])
            start += 1
        return found


class _DiskArray:
    """A one-dimensional array that grows in a temporary file, and is mapped into memory once it is complete."""

    def __init__(self, dtype: Any) -> None:
        self._dtype = np.dtype(dtype)
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the array that is mapped on it
        self._hash = hashlib.sha256()

    def append(self, values: np.ndarray[Any, Any]) -> None:
        data = values.astype(self._dtype, copy=False).tobytes()
        self._file.write(data)
        self._hash.update(data)

    def array(self) -> np.ndarray[Any, Any]:
        self._file.flush()
        return np.memmap(self._file, dtype=self._dtype, mode="r")

    def digest(self) -> str:
        return self._hash.hexdigest()
