"""Compressions that need no work, which a challenge pays nothing for: rows of the LLM's own table of embeddings.

Whoever has the tokenizer makes them: the text cut off, tokens at even distances, and what is likely to be asked about,
names and numbers, as sentences or as words with what stands beside them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from condense_core.compressor.condenser import Condenser
from condense_core.compressor.config import num_kept
from condense_core.compressor.selection import Passage, keep_sentences
from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.compressor.tokenized import make_passage
from condense_core.decoder.architecture import decoder_parts

_BESIDE = 2  # tokens on either side of a name or a number


@torch.no_grad()
def trivial_compressions(condenser: Condenser, text: str, ratio: float) -> list[SoftTokens]:
    """Those of ``text`` at ``ratio``, without ones that are the same."""
    passage, _ = make_passage(condenser.tokenizer, text, None, condenser.template_args)
    ids, ratio = list(passage.ids), int(ratio) if ratio == int(ratio) else ratio
    embed = decoder_parts(condenser.model).embed_tokens
    return [
        SoftTokens(
            embeds=embed(torch.tensor([ids[place] for place in kept], device=embed.weight.device)),
            num_context_tokens=len(ids),
            ratio=ratio,
            model_id=condenser.model_id,
            model_digest=condenser.model_digest,
            method="select",
            context_sha256=hashlib.sha256(text.encode()).hexdigest(),
        )
        for kept in dict.fromkeys(map(tuple, _places(passage, num_kept(len(ids), ratio))))
    ]


def _places(passage: Passage, count: int) -> list[Sequence[int]]:
    """Which ``count`` tokens each of them keeps."""
    n, marks = len(passage.ids), torch.tensor(passage.marks)
    near = F.max_pool1d(marks[None, None], 2 * _BESIDE + 1, 1, _BESIDE)[0, 0]
    by_word = (near + marks).argsort(descending=True, stable=True)[:count]
    return [
        range(count),
        [min(n - 1, int(i * n / count)) for i in range(count)],
        keep_sentences(marks, torch.tensor(passage.sentences), count).tolist(),
        sorted(by_word.tolist()),
    ]
