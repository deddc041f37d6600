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
from condense_core.training.data import Batch, TopLogits

#: Bytes that a row and vocabulary entry takes while its losses and their gradients are computed.
BYTES_PER_LOGIT = 32

#: What the logits of one block may take; a block has at least one row.
BLOCK_BYTES = 256 * 2**20

#: In nats; less than what fp32 tells from 1.
_LEAST_LOG = -16.0


def soft_context(compressor: Compressor, batch: Batch, ratio: float) -> Tensor:
    """Soft tokens ``[B, k, d]`` of a batch's contexts ``[B, C]``, k = ceil(C / ratio), cut as in use."""
    return scored_context(compressor, batch, ratio)[0]


def scored_context(
    compressor: Compressor, batch: Batch, ratio: float, sentence_ends: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """As ``soft_context``; and of a ``mixed`` compressor the scores ``[B, C]`` of the tokens.

    sentence_ends: bool ``[V]``, the tokens that end a sentence, which ``mixed`` keeps as a whole; None: runs of tokens.
    """
    rows, length = batch.context.shape
    offsets, ids = compressor.offsets([length] * rows, ratio), batch.context.flatten()
    if compressor.scorer is None:
        return compressor(ids, offsets, ratio).unflatten(0, (rows, -1)), None
    sentences = None
    if sentence_ends is not None:
        ends = sentence_ends[batch.context]
        sentences = (ends.cumsum(1) - ends.long()).flatten().tolist()
    soft, scores = compressor.mixed(ids, offsets, ratio, sentences)
    return soft.unflatten(0, (rows, -1)), scores.unflatten(0, (rows, length))


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
    inputs = {} if batch.turns is None else turn_inputs(batch.turns, prefix.shape[1] + context.shape[1], embeds.dtype)
    hidden = inner(inputs_embeds=embeds, use_cache=False, **inputs).last_hidden_state
    before = hidden[:, -batch.tail.shape[1] - 1 : -1]  # an answer begins behind its question, in its own conversation
    return before.flatten(0, 1).index_select(0, batch.answer_places)


def turn_inputs(turns: Tensor, start: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Positions ``[B, N]`` and additive mask ``[B, 1, N, N]`` of rows whose tails are conversations of their own.

    Args:
        turns: ``[B, T]``, as in ``Batch``.
        start: N - T, positions that stand before the tail and are seen by all of it.
        dtype: of the mask.
    """
    rows, length = turns.shape
    count = torch.arange(length, device=turns.device)
    first = torch.where(turns.diff(dim=1, prepend=turns[:, :1] - 1) != 0, count, 0).cummax(1).values
    before = torch.arange(start, device=turns.device)
    positions = torch.cat([before.expand(rows, -1), start + count - first], 1)
    seen = torch.ones(start + length, start + length, dtype=torch.bool, device=turns.device).tril().repeat(rows, 1, 1)
    seen[:, start:, start:] &= turns[:, :, None] == turns[:, None, :]
    mask = torch.zeros(seen.shape, dtype=dtype, device=turns.device).masked_fill(~seen, torch.finfo(dtype).min)
    return {"position_ids": positions, "attention_mask": mask.unsqueeze(1)}


def tail_logits(model: PreTrainedModel, context: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits ``[M, V]`` that predict the M answer tokens behind ``context [B, k, d]``, and their ids ``[M]``."""
    return decoder_logits(model, answer_states(model, context, batch)), batch.answer_ids


def answer_losses(
    model: PreTrainedModel,
    student: Tensor,
    ids: Tensor,
    teacher: Tensor | TopLogits | None = None,
    *,
    block_bytes: int = BLOCK_BYTES,
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of ``ids`` and mean KL(teacher || student), both in nats, fp32 scalars with exact gradients.

    Equal to ``F.cross_entropy`` and ``distillation`` of the logits, which never exist as a whole.

    Args:
        model: its output head makes the logits; gradients reach its weights where they ask for them.
        student: last hidden states ``[M, d]``.
        ids: the tokens ``[M]`` to predict.
        teacher: last hidden states ``[M, d]`` of the full context, without gradients, or what it said of each place;
            None: the divergence is 0.
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
        some = teacher.rows(rows) if isinstance(teacher, TopLogits) else None if teacher is None else teacher[rows]
        block: Any = (model, student[rows], ids[rows], some)
        total = total + torch.stack(checkpoint(_block_losses, *block, use_reentrant=False, preserve_rng_state=False))
    cross_entropy, divergence = total / count
    return cross_entropy, divergence


def rows_per_block(vocab_size: int, block_bytes: int = BLOCK_BYTES) -> int:
    """Rows whose losses over ``vocab_size`` entries take at most ``block_bytes``; at least one."""
    return max(1, block_bytes // (BYTES_PER_LOGIT * vocab_size))


def _block_losses(
    model: PreTrainedModel, student: Tensor, ids: Tensor, teacher: Tensor | TopLogits | None
) -> tuple[Tensor, Tensor]:
    """Sums, not means, of cross-entropy and divergence over the rows of a block."""
    log_q = F.log_softmax(decoder_logits(model, student).float(), -1)
    cross_entropy = F.nll_loss(log_q, ids, reduction="sum")
    if teacher is None:
        return cross_entropy, torch.zeros_like(cross_entropy)
    if isinstance(teacher, TopLogits):
        return cross_entropy, top_divergence(log_q, teacher).sum()
    with torch.no_grad():
        log_p = F.log_softmax(decoder_logits(model, teacher).float(), -1)
    return cross_entropy, F.kl_div(log_q, log_p, log_target=True, reduction="sum")


def top_divergence(log_q: Tensor, teacher: TopLogits) -> Tensor:
    """KL(teacher || student) ``[M]`` in nats over the teacher's K likeliest tokens and one class of all others.

    Merging tokens into a class never makes a divergence larger (the data-processing inequality), so this is a lower
    bound of the divergence over the whole vocabulary, and it is 0 for the teacher itself.

    Args:
        log_q: the student's log-probabilities ``[M, V]``, fp32.
        teacher: of the same M places.
    """
    log_p = teacher.log_probs.float()
    own = log_q.gather(1, teacher.ids)
    rest_p = (-log_p.exp().sum(1)).log1p()  # log of what is left, which rounding may make a little less than nothing
    rest_p = rest_p.nan_to_num(nan=-torch.inf).clamp_min(_LEAST_LOG)
    rest_q = (-own.exp().sum(1).clamp_max(1 - 1e-6)).log1p()
    return (log_p.exp() * (log_p - own)).sum(1) + rest_p.exp() * (rest_p - rest_q)


def distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of logits ``[M, V]``, mean over M, in nats; the definition behind ``answer_losses``."""
    target = F.log_softmax(teacher.float(), -1)
    return F.kl_div(F.log_softmax(student.float(), -1), target, log_target=True, reduction="batchmean")
