"""Losses in blocks of rows: the same values and gradients as of whole logits, without their memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import MistralConfig, MistralForCausalLM

from condense_core.training.data import TopLogits
from condense_core.training.live_bytes import LiveBytes
from condense_core.training.losses import (
    BYTES_PER_LOGIT,
    answer_losses,
    distillation,
    rows_per_block,
    top_divergence,
    turn_inputs,
)

TOLERANCES = {
    # Sums of the same fp32 terms, block by block.
    torch.float32: {"atol": 1e-6, "rtol": 1e-5},
    # Logits are rounded alike, 2^-9 of values of order 10; the sums of gradients over blocks are rounded anew.
    torch.bfloat16: {"atol": 2e-3, "rtol": 2e-2},
}


def decoder(width: int, vocab_size: int, dtype: torch.dtype) -> MistralForCausalLM:
    """A decoder of one layer, of which the losses use the way from hidden states to logits only."""
    config = MistralConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=None,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = MistralForCausalLM(config).to(dtype)
    with torch.no_grad():
        model.lm_head.weight.copy_(states(vocab_size, width, dtype, seed=1))
    return model


def states(rows: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def whole(model: Any, student: Tensor, ids: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
    """The definition: cross-entropy and divergence of all logits at once."""
    logits = model.lm_head(student)
    kl = torch.zeros(()) if teacher is None else distillation(logits, model.lm_head(teacher).detach())
    return F.cross_entropy(logits.float(), ids), kl


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("with_teacher", [True, False], ids=["distillation", "cross-entropy alone"])
@pytest.mark.parametrize(
    ("rows", "vocab_size", "block"),
    [
        pytest.param(1, 7, 1, id="one row"),
        pytest.param(13, 101, 4, id="the last block is shorter"),
        pytest.param(12, 101, 4, id="whole blocks"),
        pytest.param(5, 101, 1, id="blocks of one row"),
        pytest.param(5, 101, 64, id="one block"),
    ],
)
def test_values_and_gradients_are_those_of_whole_logits(
    dtype: torch.dtype, with_teacher: bool, rows: int, vocab_size: int, block: int
) -> None:
    found = []
    for method in (whole, answer_losses):
        model = decoder(width=9, vocab_size=vocab_size, dtype=dtype)
        student = states(rows, 9, dtype, seed=2).requires_grad_()
        teacher = states(rows, 9, dtype, seed=3) if with_teacher else None
        ids = torch.randint(vocab_size, (rows,), generator=torch.Generator().manual_seed(4))
        options = {"block_bytes": block * vocab_size * BYTES_PER_LOGIT} if method is answer_losses else {}
        cross_entropy, kl = method(model, student, ids, teacher, **options)
        (0.7 * cross_entropy + 1.3 * kl).backward()
        found.append((cross_entropy.detach(), kl.detach(), student.grad, model.lm_head.weight.grad))
    for expected, came in zip(*found, strict=True):
        torch.testing.assert_close(came, expected, **TOLERANCES[dtype])


def test_an_impossible_token_of_the_teacher_costs_nothing() -> None:
    model = decoder(width=4, vocab_size=6, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[0] = -200.0
    teacher = states(3, 4, torch.float32, seed=0).abs()
    student = states(3, 4, torch.float32, seed=1).requires_grad_()
    _, kl = answer_losses(model, student, torch.tensor([1, 2, 3]), teacher)
    kl.backward()
    assert torch.isfinite(kl)
    assert torch.isfinite(student.grad).all()


def test_memory_is_that_of_a_block_whatever_the_rows() -> None:
    """600 rows over 4,000 entries: 77 MB of logits at 32 bytes, of which never more than a block's 2.6 MB exist."""
    rows, vocab_size, block = 600, 4000, 20
    block_bytes = block * vocab_size * BYTES_PER_LOGIT
    model = decoder(width=8, vocab_size=vocab_size, dtype=torch.float32)
    model.requires_grad_(False)
    ids = torch.zeros(rows, dtype=torch.long)

    def peak(count: int, limit: int) -> int:
        student = states(count, 8, torch.float32, seed=2).requires_grad_()
        with LiveBytes() as memory:
            cross_entropy, kl = answer_losses(model, student, ids[:count], student.detach(), block_bytes=limit)
            (cross_entropy + kl).backward()
        return memory.peak

    small = rows * 8 * 4 * 4  # hidden states and their gradients
    assert peak(rows, block_bytes) < block_bytes + small
    assert peak(rows, 2**40) > 0.5 * rows * vocab_size * BYTES_PER_LOGIT  # what it would be without blocks
    assert peak(block, block_bytes) > 0.5 * block_bytes  # and the constant is no idle promise


def test_a_block_has_at_least_one_row() -> None:
    assert rows_per_block(vocab_size=10**9, block_bytes=2**20) == 1
    assert rows_per_block(vocab_size=1000, block_bytes=BYTES_PER_LOGIT * 5000) == 5


def top_of(logits: Tensor, count: int) -> TopLogits:
    best = F.log_softmax(logits.float(), -1).topk(count, -1)
    return TopLogits(best.indices, best.values)


def test_divergence_from_the_likeliest_tokens_is_that_of_merged_classes() -> None:
    logits_p, logits_q = states(6, 20, torch.float32, 1) * 2, states(6, 20, torch.float32, 2) * 2
    top = top_of(logits_p, 5)
    p, q = logits_p.softmax(-1), logits_q.softmax(-1)
    merged = []
    for row, kept in enumerate(top.ids.tolist()):
        own_p, own_q = p[row, kept], q[row, kept]
        all_p, all_q = torch.cat([own_p, 1 - own_p.sum()[None]]), torch.cat([own_q, 1 - own_q.sum()[None]])
        merged.append((all_p * (all_p / all_q).log()).sum())
    found = top_divergence(F.log_softmax(logits_q, -1), top)
    torch.testing.assert_close(found, torch.stack(merged), atol=1e-5, rtol=1e-4)
    whole_p = F.log_softmax(logits_p, -1)
    whole_kl = F.kl_div(F.log_softmax(logits_q, -1), whole_p, log_target=True, reduction="none").sum(-1)
    assert (found <= whole_kl + 1e-5).all()


def test_divergence_from_oneself_is_nothing_also_where_nothing_else_is_likely() -> None:
    logits = torch.tensor([[50.0, 0, 0, 0], [1.0, 2, 3, 4]])
    found = top_divergence(F.log_softmax(logits, -1), top_of(logits, 2))
    torch.testing.assert_close(found, torch.zeros(2), atol=1e-5, rtol=0)


def test_a_teacher_asked_before_in_blocks_and_at_once() -> None:
    model = decoder(16, 300, torch.float32)
    student, other = states(40, 16, torch.float32, 5).requires_grad_(True), states(40, 16, torch.float32, 6)
    ids = torch.arange(40)
    top = top_of(model.lm_head(other).detach(), 8)
    results = []
    for block in (1, 10**9):
        cross_entropy, kl = answer_losses(model, student, ids, top, block_bytes=block)
        (gradient,) = torch.autograd.grad(cross_entropy + kl, [student])
        results.append((cross_entropy, kl, gradient))
    torch.testing.assert_close(results[0], results[1], **TOLERANCES[torch.float32])
    expected = top_divergence(F.log_softmax(model.lm_head(student), -1), top).mean()
    torch.testing.assert_close(results[1][1], expected, **TOLERANCES[torch.float32])


def test_conversations_see_the_context_and_themselves_and_count_from_its_end() -> None:
    turns = torch.tensor([[0, 0, 0, 1, 1, -1], [0, 1, 1, 1, 2, 2]])
    inputs = turn_inputs(turns, 3, torch.float32)
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 3, 4, 3], [0, 1, 2, 3, 3, 4, 5, 3, 4]]
    for row, own in enumerate(turns.tolist()):
        for i in range(9):
            seen = [j for j in range(9) if inputs["attention_mask"][row, 0, i, j] == 0]
            expected = [j for j in range(i + 1) if i < 3 or j < 3 or own[j - 3] == own[i - 3]]
            assert seen == expected
