"""The encoder: the decoder's own embeddings and first layers, run over packed sequences without padding.

It runs the model's own ``forward``, cut behind the layer that it ends with, and with an attention function of its own,
so it multiplies, rotates and masks as the model does. Its layers are copies with shared parameters; only weights that a
LoRA adapter changes take memory of their own. The attention function is chosen in the copy's config: the model itself
is never touched.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from condense_core.compressor.compiled import CompiledLayers
from condense_core.compressor.packed import ATTENTION_NAME, CHECKED_NAME, Packing
from condense_core.decoder.architecture import (
    CHECK_TOKENS,
    check_depth,
    check_embeds,
    check_tolerance,
    cut_decoder,
    decoder_parts,
    evaluating,
    hidden_behind,
    relative_error,
    unsupported,
)
from condense_core.decoder.checked import once_per_model


class Encoder(nn.Module):
    """The first ``num_layers`` layers of ``model`` over packed embeddings: ``[T, d] -> [T, d]``.

    Parameters are shared with ``model`` until ``lora.merge`` or training replaces some. Every sequence has its own
    positions from 0.

    Raises:
        ValueError: the model has no so many layers.
        TypeError: its hidden states are not what these layers give in a pack. At the first use of a model they are
            compared with its own, on 16 tokens and as many layers as it takes to meet every kind.
    """

    def __init__(self, model: PreTrainedModel, num_layers: int, *, causal: bool = True) -> None:
        super().__init__()
        inner = decoder_parts(model)
        depth = len(inner.layers)
        if not 0 <= num_layers <= depth:
            raise ValueError(
                f"encoder_layers: got {num_layers}, expected 0 to {depth}, the layers of {model.name_or_path!r}"
            )
        self.causal = causal
        cut, self.layers = cut_decoder(model, num_layers, ATTENTION_NAME)
        self._cut = (cut,)  # in a tuple, where torch does not see it: what it holds is the model's, or in `layers`
        self._compiled: CompiledLayers | None = None
        if num_layers and not inner.embed_tokens.weight.is_meta:
            _checked(min(num_layers, check_depth(model)))(model)

    def compile_layers(self, mode: str, *, backend: Any = "inductor") -> None:
        """Run compiled layers from now on wherever no gradient is wanted; they compute with the same weights.

        Args:
            mode: one of ``compiled.MODES``.
            backend: as ``torch.compile`` takes it.
        """
        self._compiled = CompiledLayers(self._cut[0], self.layers, mode, backend) if len(self.layers) else None

    def checkpoint_like(self, model: PreTrainedModel) -> None:
        """Recompute activations in the backward pass, the way ``model.gradient_checkpointing_enable`` set it up."""
        layers: list[Any] = list(self.layers)
        for own, layer in zip(layers, decoder_parts(model).layers, strict=False):
            own.gradient_checkpointing = layer.gradient_checkpointing
            own._gradient_checkpointing_func = layer._gradient_checkpointing_func
        self.train()

    def forward(self, embeds: Tensor, cu_seqlens: list[int]) -> tuple[Tensor, Packing]:
        """Hidden states ``[T, d]`` behind the last layer, and the packing that they were computed in.

        Args:
            embeds: ``[T, d]``, as the model's ``embed_tokens`` gives them.
            cu_seqlens: offsets of the sequences in it.
        """
        packing = Packing(cu_seqlens, self.causal)
        return self.read(embeds, packing), packing

    def read(self, embeds: Tensor, packing: Packing) -> Tensor:
        """As ``forward``, of a pack whose sequences may continue others and whose attention may be observed."""
        if not len(self.layers) or not len(embeds):
            return embeds
        if self._compiled is None or not self._compiled.takes(embeds, packing):
            return _run(self._cut[0], embeds.unsqueeze(0), packing)
        hidden = _run(*self._compiled.step(embeds, packing))[: len(embeds)]
        return hidden.clone() if self._compiled.graphs else hidden


def _run(cut: Any, embeds: Tensor, packing: Packing) -> Tensor:
    """Hidden states ``[T, d]`` that a cut decoder gives for ``embeds [1, T, d]``."""
    starts = map(packing.start, range(len(packing.lengths)))
    ranges = [torch.arange(a, a + n, device=embeds.device) for a, n in zip(starts, packing.lengths, strict=True)]
    positions = torch.cat(ranges).unsqueeze(0)
    output = cut(inputs_embeds=embeds, position_ids=positions, use_cache=False, packing=packing)
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


@cache
def _checked(num_layers: int) -> Callable[[PreTrainedModel], None]:
    """A check, once for each model, of its first ``num_layers`` layers."""
    return once_per_model(partial(_check, num_layers))


@torch.no_grad()
def _check(num_layers: int, model: PreTrainedModel) -> None:
    """``TypeError`` unless the layers give the model's own hidden states in a pack, also of the second sequence."""
    embeds = check_embeds(model)
    second = CHECK_TOKENS - 4
    packing = Packing([0, CHECK_TOKENS, CHECK_TOKENS + second])
    cut, layers = cut_decoder(model, num_layers, CHECKED_NAME)
    try:
        with evaluating(model), evaluating(layers):
            own = hidden_behind(model, num_layers, inputs_embeds=embeds, use_cache=False)[0]
            found = _run(cut, torch.cat([embeds, embeds[:, :second]], 1), packing)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise unsupported(model, f"cannot be an encoder ({reason:.160})") from error
    if packing.calls != len(layers):
        raise unsupported(
            model,
            f"cannot be an encoder ({packing.calls} of its first {len(layers)} layers attend through transformers' "
            "attention interface)",
        )
    wrong = relative_error(found, torch.cat([own, own[:second]]))
    if wrong > check_tolerance(embeds.dtype):
        raise unsupported(model, f"cannot be an encoder (in a pack its hidden states are off by {wrong:.0%})")
