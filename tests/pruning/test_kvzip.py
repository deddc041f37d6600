"""KVzip: scores of a repetition of the context."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from condense_core.compressor.condenser import Condenser
from condense_core.pruning import methods
from condense_core.pruning.base import ScoringPass
from condense_core.pruning.text import prompt_of, question_ids
from condense_testing.pruning import oracles
from condense_testing.pruning.method_cases import (
    DTYPES,
    INF,
    TOLERANCE,
    Case,
    check,
    make_case,
)


def in_scoring_pass(padding: str, dtype: torch.dtype, start: int, stop: int, prompt: int = 5) -> tuple[Case, int]:
    """The last columns repeat tokens ``start`` to ``stop`` of a context of 50, behind a prompt."""
    queries = prompt + stop - start
    total = 50 + queries
    case = make_case(
        padding=padding, dtype=dtype, tokens=total, lengths=None if padding == "none" else (total - 13, total)
    )
    ctx = replace(
        case.ctx,
        cos=case.ctx.cos[:, -queries:],
        sin=case.ctx.sin[:, -queries:],
        scoring_pass=ScoringPass((7,) * prompt, start, stop),
    )
    return Case(case.q[:, :, -queries:], case.k, case.v, ctx, case.places), queries


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("part", [(0, 20), (20, 37)])
def test_kvzip(part: tuple[int, int], padding: str, dtype: torch.dtype) -> None:
    case, _ = in_scoring_pass(padding, dtype, *part)
    check(methods.KVzip(keep=0.5, sink=3), case, *part)


def test_kvzip_of_a_right_padded_context() -> None:
    """The appended tokens stand behind the padding: it is real, though ``bounds`` ends before."""
    case, queries = in_scoring_pass("none", torch.float32, 0, 20)
    context = case.k.shape[2] - queries
    case.ctx = replace(
        case.ctx, bounds=torch.tensor([[0, context - 11], [0, context]]), lengths=(context - 11, context)
    )
    for x in (case.k, case.v):
        x[0, :, context - 11 : context] = math.nan
    method = methods.KVzip(keep=0.5, sink=3)
    scores = method.score(None, case.q, case.k, case.v, case.ctx)
    short = case.sequence(0)
    keep = [*range(context - 11), *range(context, case.k.shape[2])]
    short = replace(short, q=case.q[0].double(), k=case.k[0, :, keep].double(), v=case.v[0, :, keep].double())
    expected = oracles.kvzip(short, method, 0, 20)
    torch.testing.assert_close(scores[0, :, : context - 11].double(), expected[:, : context - 11], **TOLERANCE)
    assert (scores[0, :, context - 11 :] == -INF).all()


def test_kvzip_reads_everything_again_once() -> None:
    method = methods.KVzip(keep=0.5, prompt_ids=(3, 1), chunk=10)
    assert method.scoring_passes(23) == [
        ScoringPass((3, 1), 0, 10),
        ScoringPass((3, 1), 10, 20),
        ScoringPass((3, 1), 20, 23),
    ]
    assert method.scoring_passes(0) == []


def test_kvzip_scores_in_a_scoring_pass_only() -> None:
    case = make_case()
    with pytest.raises(ValueError, match=r"KVzip: ctx.scoring_pass is None, expected one of scoring_passes"):
        methods.KVzip(keep=0.5).score(None, case.q, case.k, case.v, case.ctx)


def test_a_text_is_repeated_as_the_chat_asks_for_it(tiny_condenser: Condenser) -> None:
    tokenizer = tiny_condenser.tokenizer
    context = "The old mill burned down. " * 12
    prompt = prompt_of(tiny_condenser.model, tokenizer, context)
    ids, first = prompt.input_ids, prompt.text_start
    assert tokenizer.decode(ids[first:]).strip() == context.strip()
    passes = methods.KVzip(keep=0.5, chunk=40).for_prompt(prompt).scoring_passes(len(ids))
    assert [(p.start, p.stop) for p in passes] == [
        (start, min(start + 40, len(ids))) for start in range(first, len(ids), 40)
    ]
    assert passes[0].prompt_ids == tuple(question_ids(tokenizer, "Repeat the previous context exactly."))
    last = tokenizer.decode(ids[first + 32 : first + 40])
    again = f"Repeat the part of the previous context exactly, starting with{last}"
    assert passes[1].prompt_ids == tuple(question_ids(tokenizer, again))
    own = methods.KVzip(keep=0.5, prompt_ids=(3, 1))
    assert own.for_prompt(prompt) == own
    assert "requests" not in repr(methods.KVzip(keep=0.5).for_prompt(prompt))
