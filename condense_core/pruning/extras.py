"""What models give their attention function besides queries, keys, values and a mask: honoured here, or refused."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Given by transformers for other purposes than this layer's attention; without a meaning for it.
_OF_NO_MEANING = frozenset(
    {
        *("position_ids", "cache_position", "use_cache", "return_dict", "num_items_in_batch", "logits_to_keep"),
        *(
            "output_attentions",
            "output_hidden_states",
            "output_router_logits",
            "past_key_values",
            "position_embeddings",
        ),
    }
)
_HONOURED = frozenset({"scaling", "sliding_window", "softcap", "s_aux", "sinks", "dropout", "is_causal"})

BY_COLUMN = ("position_bias", "indices", "block_indices", "cu_seq_lens_q", "cu_seq_lens_k")
"""Arguments that say something of every cached token by its place, which an eviction changes."""


@dataclass(frozen=True)
class Extras:
    """The attention of one layer, as far as it differs from softmax(q k) v.

    Attributes:
        scale: factor on the logits.
        sliding_window: how many tokens back a query looks, itself included; None: all.
        softcap: c of ``c * tanh(logit / c)`` (Gemma 2); None: none.
        sinks: ``[H]``, a logit of each head that takes part in the softmax and has no value (GPT-OSS); None: none.
    """

    scale: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether scale and window are all there is."""
        return self.softcap is None and self.sinks is None

    @staticmethod
    def of(module: nn.Module, arguments: Mapping[str, Any]) -> Extras:
        """What ``module`` gave its attention function as keyword arguments.

        Raises:
            ValueError: one of them has a meaning that is not known here; the message names it.
        """
        given = {name: value for name, value in arguments.items() if value is not None}
        unknown = sorted(set(given) - _HONOURED - _OF_NO_MEANING)
        refused = [name for name in unknown if given[name] is not False]
        if given.get("dropout"):
            refused.append(f"dropout={given['dropout']}")
        if given.get("is_causal") is False:
            refused.append("is_causal=False")
        if refused:
            raise ValueError(
                f"attention: {type(module).__name__} asks for {', '.join(refused)}, which a cache whose heads or "
                f"sequences hold different numbers of tokens cannot do; supported: {', '.join(sorted(_HONOURED))}"
            )
        sinks = given.get("s_aux", given.get("sinks"))
        if sinks is None:  # GPT-OSS's eager attention reads them from the module
            own = getattr(module, "sinks", None)
            sinks = own if isinstance(own, Tensor) else None
        scale = given.get("scaling", getattr(module, "scaling", None))
        if scale is None:
            raise ValueError(f"attention: {type(module).__name__} gives no scaling, expected the factor on its logits")
        return Extras(float(scale), given.get("sliding_window"), given.get("softcap"), sinks)


def check_evicted(module: nn.Module, arguments: Mapping[str, Any]) -> None:
    """``ValueError`` if ``arguments`` say something of every token by its place, though some were evicted."""
    for name in BY_COLUMN:
        if arguments.get(name) is not None:
            raise ValueError(
                f"attention: {type(module).__name__} gives {name}, which counts tokens by their place, and some were "
                "evicted; expected a model without it"
            )


def check_generation() -> None:
    """``ValueError`` inside a ``generate(prefill_chunk_size=)``, whose first chunk looks like a prompt to the model.

    transformers tells the model nothing of its chunks, so that only the caller's frame shows them.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "_prefill":
        frame = frame.f_back
    config = None if frame is None else frame.f_locals.get("generation_config")
    size = getattr(config, "prefill_chunk_size", None)
    if size is not None:
        raise ValueError(
            f"prefill_chunk_size is {size}, expected None in a session, which would prune the first chunk as if it "
            f"were the prompt; to read in chunks, PrunedCache.prefill(..., chunk_size={size}) and "
            "model.generate(**cache.inputs(ids))"
        )


def capped_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, extras: Extras, sinks: Tensor | None) -> Tensor:
    """Attention with softcap and sinks, in float32 inside.

    Args:
        q: ``[..., Q, D]``. k, v: ``[..., N, D]``.
        seen: ``[..., Q, N]`` bool, which tokens a query looks at; at least one.
        extras: whose scale and softcap are used.
        sinks: broadcast to ``[..., Q, 1]``, or None.

    Returns:
        ``[..., Q, D]`` in q's dtype.
    """
    logits = q.float() @ k.float().mT * extras.scale
    if extras.softcap is not None:
        logits = extras.softcap * torch.tanh(logits / extras.softcap)
    logits = logits.masked_fill(~seen, float("-inf"))
    if sinks is None:
        weights = logits.softmax(-1)
    else:
        sink = sinks.float().expand(*logits.shape[:-1], 1)
        weights = torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
    return (weights @ v.float()).to(q.dtype)
