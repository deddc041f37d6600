"""Losses of a decoder that reads a context as tokens or as soft tokens: cross-entropy and distillation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from condense_core.compressor.compressor import Compressor
from condense_core.decoder.model import decoder_parts
from condense_core.training.data import Batch


def soft_context(compressor: Compressor, batch: Batch, ratio: int) -> Tensor:
    """Soft tokens ``[B, k, d]`` of a batch's contexts ``[B, C]``, k = ceil(C / ratio), cut as in use."""
    rows, length = batch.context.shape
    offsets = compressor.offsets([length] * rows, ratio)
    return compressor(batch.context.flatten(), offsets, ratio).unflatten(0, (rows, -1))


def tail_logits(model: PreTrainedModel, context: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits ``[M, V]`` that predict the M masked tail tokens behind ``context [B, k, d]``, and their ids ``[M]``.

    The output head runs on the M rows only.
    """
    inner = decoder_parts(model)
    rows = context.shape[0]
    prefix = inner.embed_tokens(batch.prefix).expand(rows, -1, -1).to(context.dtype)
    tail = inner.embed_tokens(batch.tail).to(context.dtype)
    embeds = torch.cat([prefix, context, tail], 1)
    hidden = inner(inputs_embeds=embeds, use_cache=False).last_hidden_state
    before = hidden[:, -batch.tail.shape[1] - 1 : -1]
    return model.get_output_embeddings()(before[batch.tail_mask]), batch.tail[batch.tail_mask]


def distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of logits ``[M, V]``, mean over M, in nats."""
    target = F.log_softmax(teacher.float(), -1)
    return F.kl_div(F.log_softmax(student.float(), -1), target, log_target=True, reduction="batchmean")
