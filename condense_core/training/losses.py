"""Losses of a decoder that reads a context as tokens or as soft tokens: cross-entropy and distillation.

Logits are the largest tensors of a training step: cross-entropy and divergence of M rows over a vocabulary of V take 32
bytes for each of the M * V entries (fp32 copies, log-softmaxes and their gradients). ``answer_losses`` therefore works
in blocks of rows, whose logits are computed again in the backward pass instead of being kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from condense_core.compressor.compressor import Compressor
from condense_core.decoder.architecture import decoder_parts
from condense_core.decoder.logits import decoder_logits
from condense_core.training.data import Batch

#: Bytes that a row and vocabulary entry takes while its losses and their gradients are computed.
BYTES_PER_LOGIT = 32

#: What the logits of one block may take; a block has at least one row.
BLOCK_BYTES = 256 * 2**20


def soft_context(compressor: Compressor, batch: Batch, ratio: int) -> Tensor:
    """Soft tokens ``[B, k, d]`` of a batch's contexts ``[B, C]``, k = ceil(C / ratio), cut as in use."""
    rows, length = batch.context.shape
    offsets = compressor.offsets([length] * rows, ratio)
    return compressor(batch.context.flatten(), offsets, ratio).unflatten(0, (rows, -1))


def answer_states(model: PreTrainedModel, context: Tensor, batch: Batch) -> Tensor:
    """Last hidden states ``[M, d]`` at the places that predict the M answer tokens of ``batch``.

    Args:
        model: the decoder; its output head is not run.
        context: embeddings ``[B, k, d]`` that stand where the context does: of its tokens, or soft tokens.
        batch: M is the number of places where its ``tail_mask`` is true.
    """
    inner = decoder_parts(model)
    rows = context.shape[0]
    prefix = inner.embed_tokens(batch.prefix).expand(rows, -1, -1).to(context.dtype)
    tail = inner.embed_tokens(batch.tail).to(context.dtype)
    embeds = torch.cat([prefix, context, tail], 1)
    hidden = inner(inputs_embeds=embeds, use_cache=False).last_hidden_state
    before = hidden[:, -batch.tail.shape[1] - 1 : -1]
    return before.flatten(0, 1).index_select(0, batch.answer_places)


def tail_logits(model: PreTrainedModel, context: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits ``[M, V]`` that predict the M answer tokens behind ``context [B, k, d]``, and their ids ``[M]``."""
    return decoder_logits(model, answer_states(model, context, batch)), batch.answer_ids


def answer_losses(
    model: PreTrainedModel,
    student: Tensor,
    ids: Tensor,
    teacher: Tensor | None = None,
    *,
    block_bytes: int = BLOCK_BYTES,
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of ``ids`` and mean KL(teacher || student), both in nats, fp32 scalars with exact gradients.

    Equal to ``F.cross_entropy`` and ``distillation`` of the logits, which never exist as a whole.

    Args:
        model: its output head makes the logits; gradients reach its weights where they ask for them.
        student: last hidden states ``[M, d]``.
        ids: the tokens ``[M]`` to predict.
        teacher: last hidden states ``[M, d]`` of the full context, without gradients; None: the divergence is 0.
        block_bytes: what the logits of a block may take; see ``BYTES_PER_LOGIT``.
    """
    count = len(ids)
    size = rows_per_block(model.get_output_embeddings().weight.shape[0], block_bytes)
    if count <= size:
        cross_entropy, divergence = _block_losses(model, student, ids, teacher)
        return cross_entropy / count, divergence / count
    total = student.new_zeros(2, dtype=torch.float32)
    for start in range(0, count, size):
        rows = slice(start, start + size)
        block: Any = (model, student[rows], ids[rows], None if teacher is None else teacher[rows])
        total = total + torch.stack(checkpoint(_block_losses, *block, use_reentrant=False, preserve_rng_state=False))
    cross_entropy, divergence = total / count
    return cross_entropy, divergence


def rows_per_block(vocab_size: int, block_bytes: int = BLOCK_BYTES) -> int:
    """Rows whose losses over ``vocab_size`` entries take at most ``block_bytes``; at least one."""
    return max(1, block_bytes // (BYTES_PER_LOGIT * vocab_size))


def _block_losses(
    model: PreTrainedModel, student: Tensor, ids: Tensor, teacher: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sums, not means, of cross-entropy and divergence over the rows of a block."""
    log_q = F.log_softmax(decoder_logits(model, student).float(), -1)
    cross_entropy = F.nll_loss(log_q, ids, reduction="sum")
    if teacher is None:
        return cross_entropy, torch.zeros_like(cross_entropy)
    with torch.no_grad():
        log_p = F.log_softmax(decoder_logits(model, teacher).float(), -1)
    return cross_entropy, F.kl_div(log_q, log_p, log_target=True, reduction="sum")


def distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of logits ``[M, V]``, mean over M, in nats; the definition behind ``answer_losses``."""
    target = F.log_softmax(teacher.float(), -1)
    return F.kl_div(F.log_softmax(student.float(), -1), target, log_target=True, reduction="batchmean")
