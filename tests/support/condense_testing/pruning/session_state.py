"""What a session may change of a model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


def state(model: PreTrainedModel) -> tuple[Any, ...]:
    """What a session may change while it is open."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return model.config._attn_implementation, sum(hooks), model.config.to_json_string()
