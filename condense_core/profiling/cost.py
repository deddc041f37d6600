"""Operations and bytes of an encoder, counted from shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from condense_core.compressor.compressor import Compressor
from condense_core.compressor.config import num_kept
from condense_core.decoder.architecture import decoder_parts


def linear_flops(module: nn.Module) -> int:
    """Of one token through all linears of ``module``: two for each weight."""
    return sum(2 * m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))


def attended_pairs(length: int, window: int | None = None) -> int:
    """Pairs of a query and a key that causal attention over ``length`` tokens has; window: keys of a token at most."""
    full = min(length, length if window is None else window)
    return full * (full + 1) // 2 + (length - full) * full


def layer_window(config: Any, layer: int) -> int | None:
    """How many tokens a layer looks back, itself counted; None: all."""
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[layer] != "sliding_attention":
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


def encode_flops(compressor: Compressor, config: Any, segments: Sequence[int], ratio: int) -> int | None:
    """Floating point operations of compressing segments of so many tokens; None for a mixture of experts.

    Counted are linears, attention (causal, both products) and the pooling's two passes over the tokens; norms,
    rotations and activations are not.
    """
    layers = compressor.encoder.layers
    if any(parameter.dim() > 2 for parameter in layers.parameters()):
        return None
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    slots = [num_kept(length, ratio) for length in segments]
    read = [n + k for n, k in zip(segments, slots, strict=True)] if compressor.memory is not None else list(segments)
    total = linear_flops(layers) * sum(read)
    for index in range(len(layers)):
        total += sum(4 * heads * head_dim * attended_pairs(n, layer_window(config, index)) for n in read)
    if compressor.pooler is not None:
        total += 4 * sum(segments) * int(compressor.config.d_model)
    if compressor.projection is not None:
        total += linear_flops(compressor.projection) * sum(slots)
    return total


def weight_bytes(compressor: Compressor) -> int:
    """Bytes that each compression reads whatever the text: of the layers and of what is the compressor's own."""
    modules = (compressor.encoder.layers, *compressor.own_modules().values())
    return sum(t.nbytes for module in modules for t in (*module.parameters(), *module.buffers()))


def layer_bytes(model: Any, num_layers: int) -> int:
    """Bytes of the embeddings and the first ``num_layers`` layers of ``model``, which may be on the meta device."""
    inner = decoder_parts(model)
    modules = (inner.embed_tokens, inner.norm, *inner.layers[:num_layers])
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())


def activation_bytes(config: Any, tokens: int, itemsize: int) -> int:
    """About what a layer over ``tokens`` tokens holds at once: residuals, queries, keys, values and the MLP."""
    heads = int(config.num_attention_heads)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    width = 6 * int(config.hidden_size) + 2 * (heads + 2 * groups) * head_dim
    width += 3 * int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    return tokens * width * itemsize
