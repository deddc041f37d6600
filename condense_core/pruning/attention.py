"""Attention while a session is open: an attention function registered with transformers under a name of its own.

A model is switched to it (in its config, which its attention modules share) while sessions on it are open, and back
when the last one ends. A thread that has no session on the model is served by the model's own attention function and
its own masks, so the switch is invisible to it at any moment.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextvars import ContextVar
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from condense_core.decoder.architecture import unsupported

PREFIX = "condense_pruning|"
BASES = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
"""The attention functions that a session can stand in for."""


class OpenSession(Protocol):
    """What the registered attention function asks of a session."""

    @property
    def config(self) -> Any:
        """The config of the model that it is open on, the same object."""

    def attend(
        self, module: nn.Module, base: str, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of ``query [B, H, Q, D]`` over ``key, value [B, G, N, D]``; base: the model's own function."""


SESSIONS: ContextVar[tuple[OpenSession, ...]] = ContextVar("condense_core pruning sessions", default=())
"""The open sessions of this thread or task, innermost last."""

_lock = Lock()
_switched: dict[int, tuple[int, str]] = {}  # id of a config -> open sessions, its own attention function


def session_on(config: Any) -> OpenSession | None:
    """The innermost session of this thread on the model with ``config``."""
    return next((s for s in reversed(SESSIONS.get()) if s.config is config), None)


def switch(model: PreTrainedModel) -> None:
    """Let ``model`` use the session's attention function; counts how often."""
    config = model.config
    with _lock:
        count, own = _switched.get(id(config), (0, config._attn_implementation))
        if count == 0:
            if own not in BASES:
                raise ValueError(f"model: attention {own!r} cannot be pruned, expected one of {', '.join(BASES)}")
            _register(own)
            config._attn_implementation = PREFIX + own
        _switched[id(config)] = (count + 1, own)


def switch_back(model: PreTrainedModel) -> None:
    """Undo one ``switch``; the last one restores the model's own attention function."""
    config = model.config
    with _lock:
        count, own = _switched[id(config)]
        if count > 1:
            _switched[id(config)] = (count - 1, own)
        else:
            del _switched[id(config)]
            config._attn_implementation = own


def attention_of(layer: Any) -> Any:
    """A decoder layer's attention module; ``TypeError`` where it has none of the usual form."""
    module = getattr(layer, "self_attn", None)
    missing = [name for name in ("layer_idx", "o_proj", "scaling") if not hasattr(module, name)]
    if missing:
        raise unsupported(layer, f"has no self_attn with {', '.join(missing)}")
    return module


def base_attention(module: nn.Module, base: str) -> Callable[..., Any]:
    """The model's own attention function; the eager one is defined beside the class, or one that it inherits from."""
    if base == "eager":
        for kind in type(module).__mro__:
            function: Callable[..., Any] | None
            function = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
            if function is not None:
                return function
        raise ValueError(
            f"model: no eager_attention_forward beside {type(module).__name__}; expected attn_implementation='sdpa'"
        )
    return ALL_ATTENTION_FUNCTIONS[base]


def _register(base: str) -> None:
    """Make the name known, once."""
    name = PREFIX + base
    if name in ALL_MASK_ATTENTION_FUNCTIONS:
        return
    own_mask = ALL_MASK_ATTENTION_FUNCTIONS[base]

    @torch.compiler.disable
    def mask(*args: Any, config: Any = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        # Where more than causality and padding is masked (packed sequences), the model's own mask says it.
        if session_on(config) is not None and kwargs.get("allow_is_causal_skip", True):
            return attention_mask  # [B, tokens seen] or None: each layer makes of it what it needs
        return own_mask(*args, config=config, attention_mask=attention_mask, **kwargs)

    @torch.compiler.disable
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        session = session_on(module.config)
        if session is None:
            return base_attention(module, base)(module, query, key, value, attention_mask, **kwargs)
        return session.attend(module, base, query, key, value, attention_mask, **kwargs)

    ALL_MASK_ATTENTION_FUNCTIONS.register(name, mask)
    ALL_ATTENTION_FUNCTIONS.register(name, attention)
