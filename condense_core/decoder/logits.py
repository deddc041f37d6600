"""The way from a decoder's last hidden states to its logits, as the model itself goes it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from condense_core.decoder.architecture import (
    check_embeds,
    check_tolerance,
    decoder_parts,
    evaluating,
    relative_error,
    unsupported,
)
from condense_core.decoder.checked import once_per_model


class _Given(nn.Module):
    """Stands where the inner model stands, and has computed already."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *_: Any, **__: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=self.hidden)


def decoder_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits ``[..., V]`` of ``hidden [..., d]``, the inner model's ``last_hidden_state`` or some rows of it.

    The model's own ``forward`` computes them, so that a logit scale (Cohere, Granite) and a final softcap (Gemma2) are
    the model's. At the first use of a model they are compared with the logits that it gives for 16 tokens.

    Raises:
        TypeError: the model's logits are not a function of these hidden states alone; the message names the model.
    """
    if not hidden.is_meta and not isinstance(hidden, FakeTensor):  # neither has values to compare
        _check(model)
    return _logits(model, hidden)


@contextmanager
def dense_head_input(model: PreTrainedModel) -> Iterator[None]:
    """Around batched forward passes that keep the logits of some positions.

    Their hidden states are a slice, which torch does not fold into one matrix product: in bfloat16 on a CPU it copies
    the output head once for each sequence instead (0.57 GB for ten of SmolLM2-135M), longer than the layers take.
    """
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        hook.remove()


def _logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    if model.get_output_embeddings() is None or "model" not in model._modules:
        raise unsupported(model, "has no output head over its inner model")
    rows = hidden.reshape(1, -1, hidden.shape[-1])
    head = copy.copy(model)
    head.__dict__["_modules"] = dict(model._modules) | {"model": _Given(rows)}
    output = type(model).forward(head, inputs_embeds=rows, use_cache=False, return_dict=True)
    logits: Tensor = output.logits
    return logits.reshape(*hidden.shape[:-1], logits.shape[-1])


@once_per_model
@torch.no_grad()
def _check(model: PreTrainedModel) -> None:
    with evaluating(model):
        output = model(inputs_embeds=check_embeds(model), use_cache=False, output_hidden_states=True)
        try:
            found = _logits(model, output.hidden_states[-1])
        except (AttributeError, KeyError, IndexError, RuntimeError) as error:
            raise unsupported(model, f"does not give logits from hidden states alone ({error!s:.80})") from error
    wrong = relative_error(found[0], output.logits[0])
    if wrong > check_tolerance(decoder_parts(model).embed_tokens.weight.dtype):
        raise unsupported(model, f"gives other logits than its output head does (off by {wrong:.0%})")
