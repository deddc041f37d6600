"""What this project needs of a decoder, and what it says to one that has something else."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

SUPPORTED = (
    *("Mistral", "Llama", "Qwen2", "Qwen3", "Phi3", "OLMo2", "Mixtral", "Granite"),
    *("Gemma2", "Gemma3", "SmolLM3", "Cohere"),
)
"""Families that the tests run (docs/models.md says what of each); a model alike in structure works too."""

CHECK_TOKENS = 16
"""Tokens that a self-check reads."""

_SMALL = 20_000_000  # parameters of all layers together
_PARTS = ("embed_tokens", "layers", "norm", "rotary_emb")
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def unsupported(model: nn.Module, what: str) -> TypeError:
    """The error for a model that ``what`` is said of, such as "has no rotary embedding"; one line."""
    families = ", ".join(SUPPORTED[:-1])
    return TypeError(f"model: {type(model).__name__} {what}; supported are {families} and {SUPPORTED[-1]}")


def decoder_parts(model: PreTrainedModel) -> Any:
    """The inner model that holds ``embed_tokens``, ``layers``, ``norm`` and ``rotary_emb``.

    Only names are looked at; whether what stands behind them computes what this project takes it for, the self-checks
    find out at the first use.

    Raises:
        TypeError: it is no such decoder; the message says what it is.
    """
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        raise TypeError(
            f"model: got a {type(model).__name__}, expected the model inside it: pass model.get_base_model(), in which "
            "the adapter stays active, or model.merge_and_unload()"
        )
    inner = getattr(model, "model", model)
    if isinstance(getattr(inner, "language_model", None), nn.Module):
        raise unsupported(model, "reads more than text (its decoder is a part, .language_model)")
    if isinstance(getattr(inner, "decoder", None), nn.Module):
        raise unsupported(model, "keeps its layers in a .decoder, as encoder-decoders do")
    missing = [name for name in _PARTS if not isinstance(getattr(inner, name, None), nn.Module)]
    if missing:
        raise unsupported(model, f"has no {', '.join(missing)} where expected")
    return inner


def cut_decoder(model: PreTrainedModel, num_layers: int, attention: str) -> tuple[Any, nn.ModuleList]:
    """The inner model that ends behind its first ``num_layers`` layers, without final norm; and those layers.

    It runs the model's own ``forward``, so embedding multipliers, rotary tables and masks are what the model makes of
    them, with an attention function of its own. Parameters and buffers are shared with ``model``, which is not touched:
    modules are copied as far as they hold a config. Hooks are not copied.

    Args:
        attention: the name of a function registered with transformers' ``ALL_ATTENTION_FUNCTIONS``.
    """
    inner = decoder_parts(model)
    config = copy.deepcopy(model.config)
    config._attn_implementation = attention
    memo: dict[int, Any] = {id(p): p for p in inner.parameters()} | {id(b): b for b in inner.buffers()}
    memo |= {id(each): config for each in (model.config, inner.config)}
    for layer in inner.layers[:num_layers]:
        for module in layer.modules():  # a hook may be bound to anything, such as a pruning session and its model
            memo |= {id(getattr(module, name)): OrderedDict() for name in _HOOKS if hasattr(module, name)}
    layers = nn.ModuleList(copy.deepcopy(layer, memo) for layer in inner.layers[:num_layers])
    cut = copy.copy(inner)
    cut.__dict__ |= {name: OrderedDict() for name in _HOOKS}
    cut.__dict__ |= {"_modules": dict(inner._modules) | {"layers": layers, "norm": nn.Identity()}, "config": config}
    return cut, layers


class _Reached(Exception):
    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


@torch.no_grad()
def hidden_behind(model: PreTrainedModel, num_layers: int, **inputs: Any) -> Tensor:
    """The model's own hidden states ``[B, N, d]`` behind its first ``num_layers`` layers, before any final norm.

    Args:
        inputs: what the inner model takes, ``inputs_embeds [B, N, d]`` or ``input_ids [B, N]`` among it. The model
            computes no further than needed.
    """
    inner, caller, passed = decoder_parts(model), get_ident(), False

    def stop(_module: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> None:
        if passed and get_ident() == caller:  # other threads may be using the model
            raise _Reached(args[0] if args else (kwargs or {})["hidden_states"])

    def behind_last(*_: Any) -> None:  # NanoChat norms its embeddings too
        nonlocal passed
        passed = passed or get_ident() == caller

    handles = []
    if num_layers < len(inner.layers):
        passed, target = True, inner.layers[num_layers]
    else:
        target = inner.norm
        handles.append(inner.layers[-1].register_forward_hook(behind_last))
    handles.append(target.register_forward_pre_hook(stop, with_kwargs=True))
    try:
        inner(**inputs)
    except _Reached as reached:
        return reached.hidden
    finally:
        for handle in handles:
            handle.remove()
    raise unsupported(model, f"does not pass its layer {num_layers} in a forward pass")


def layer_kinds(model: PreTrainedModel) -> list[Hashable]:
    """For each layer what it is: layers of one kind run the same code with other weights.

    The classes of the layer and of its attention, the config's type of the layer, and every flag, number and name that
    the two modules hold (whether it rotates, how far it looks), its own index excepted.
    """
    layers = decoder_parts(model).layers
    types = list(getattr(model.config, "layer_types", None) or ()) or [None] * len(layers)

    def facts(module: Any) -> tuple[Any, ...]:
        plain = {k: v for k, v in vars(module).items() if v is None or isinstance(v, bool | int | float | str)}
        return type(module), *sorted((k, repr(v)) for k, v in plain.items() if k not in ("layer_idx", "training"))

    return [
        (facts(layer), facts(getattr(layer, "self_attn", layer)), kind)
        for layer, kind in zip(layers, types, strict=True)
    ]


def check_depth(model: PreTrainedModel) -> int:
    """How many of the first layers a self-check runs: enough to meet every kind, and of a small model at least four.

    A pass over all weights of a 7B model takes a second on a CPU; a check, of several passes, must not.
    """
    layers = decoder_parts(model).layers
    kinds = layer_kinds(model)
    enough = 1 + max(map(kinds.index, kinds), default=-1)
    small = sum(parameter.numel() for parameter in layers.parameters()) <= _SMALL
    return max(enough, min(len(layers), 4)) if small else enough


def check_embeds(model: PreTrainedModel) -> Tensor:
    """Embeddings ``[1, 16, d]`` of some tokens of the vocabulary, for a self-check."""
    embed = decoder_parts(model).embed_tokens
    ids = torch.arange(CHECK_TOKENS, device=embed.weight.device) * 37 + 11
    embeds: Tensor = embed(ids % embed.weight.shape[0]).detach().unsqueeze(0)
    return embeds


def relative_error(found: Tensor, own: Tensor) -> float:
    """How far rows ``found [N, d]`` are from the model's ``own``, relative to these: the median over the N tokens.

    The median, since in a mixture of experts a rounding error may send single tokens to another expert.
    """
    error = (found.float() - own.float()).norm(dim=-1) / own.float().norm(dim=-1).clamp_min(1e-30)
    return float(error.nan_to_num(torch.inf).median())


def check_tolerance(dtype: torch.dtype) -> float:
    """What ``relative_error`` may be where two ways to compute the same differ in their rounding alone.

    A multiplier, a rotation or a mask that is not the model's own gives more than 0.1 on random and trained weights.
    """
    return 1e-3 if dtype in (torch.float32, torch.float64) else 0.1


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, no part of ``module`` drops values at random; behind, each trains that did before."""
    training = [part for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True
