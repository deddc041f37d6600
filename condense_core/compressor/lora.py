"""LoRA on the encoder's linear layers (Hu et al. 2021, arXiv 2106.09685), in peft's file format.

While training, an adapter is a parametrised linear; at load it is merged into a copy of the weight, so that inference
pays nothing. Files written here load in peft, and files of peft load here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from condense_core.files.tensors import save_tensors

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model.model."

_STARTS_ON_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""How an adapter may begin so that it is added to the base model's weights; others (PiSSA, OLoRA, CorDA, LoftQ) take
something of the base away first."""
_WITHOUT_EFFECT = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "bias", "eva_config", "runtime_config"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"),
    *("inference_mode", "megatron_core", "qalora_group_size"),
}
"""Entries of an adapter's config that are read here, or that say nothing of how it is merged."""


class LoRALinear(nn.Module):
    """``base(x) + B A x * alpha / rank`` with the base frozen by whoever owns it; B starts at zero."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base, self.scaling = base, alpha / rank
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        low = nn.functional.linear(x, self.lora_A.to(x.dtype))
        return self.base(x) + self.scaling * nn.functional.linear(low, self.lora_B.to(x.dtype))


def _linears(layers: nn.Module, targets: tuple[str, ...]) -> Iterator[tuple[nn.Module, str, str]]:
    """(parent, attribute, dotted name) of every linear whose last name is a target."""
    for name, module in list(layers.named_modules()):
        for attribute, child in module.named_children():
            if attribute in targets and isinstance(child, nn.Linear | LoRALinear):
                yield module, attribute, f"{name}.{attribute}"


def attach(layers: nn.Module, rank: int, alpha: float, targets: tuple[str, ...] = TARGETS) -> list[nn.Parameter]:
    """Wrap every target linear below ``layers``; returns the new parameters."""
    parameters: list[nn.Parameter] = []
    for parent, attribute, _ in _linears(layers, targets):
        adapter = LoRALinear(getattr(parent, attribute), rank, alpha)
        setattr(parent, attribute, adapter)
        parameters += [adapter.lora_A, adapter.lora_B]
    return parameters


def save(layers: nn.Module, folder: Path, *, rank: int, alpha: float, base_model: str) -> None:
    """Write the attached adapters in peft's format; ``ValueError`` where none is attached to the layers."""
    tensors: dict[str, Tensor] = {}
    linears = list(_linears(layers, TARGETS))
    for parent, attribute, name in linears:
        adapter = getattr(parent, attribute)
        if isinstance(adapter, LoRALinear):
            tensors[f"{_PREFIX}layers.{name}.lora_A.weight"] = adapter.lora_A.detach().to(torch.bfloat16).contiguous()
            tensors[f"{_PREFIX}layers.{name}.lora_B.weight"] = adapter.lora_B.detach().to(torch.bfloat16).contiguous()
    if linears and not tensors:
        raise ValueError("lora_rank: no adapter is attached (a merged one cannot be saved again)")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(TARGETS),
        "layers_to_transform": list(range(len(list(layers.children())))),
        "bias": "none",
        "inference_mode": True,
    }
    save_tensors(tensors, folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def load(layers: nn.Module, folder: Path) -> None:
    """Set the adapters that are attached to ``layers`` to those that ``save`` wrote into ``folder``, to be trained on.

    Raises:
        ValueError: there is no adapter, or one of other linears or shapes.
    """
    _, tensors = _read(folder)
    attached = {
        f"{_PREFIX}layers.{name}.{which}.weight": getattr(getattr(parent, attribute), which)
        for parent, attribute, name in _linears(layers, TARGETS)
        for which in ("lora_A", "lora_B")
        if isinstance(getattr(parent, attribute), LoRALinear)
    }
    odd = sorted(set(attached) ^ set(tensors))
    odd += [name for name, own in attached.items() if name in tensors and own.shape != tensors[name].shape]
    if odd:
        raise ValueError(f"{folder}: the adapter does not fit the attached one: {odd[0]} is another or missing")
    for name, own in attached.items():
        own.copy_(tensors[name])


@torch.no_grad()
def merge(layers: nn.Module, folder: Path) -> None:
    """Merge the peft adapter in ``folder`` into ``layers``, giving each changed weight memory of its own.

    Adapter entries for layers beyond ``layers`` are an error, as is any entry this code does not understand: an adapter
    applied in part would be a wrong answer.
    """
    config, tensors = _read(folder)
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    modules = dict(layers.named_modules())
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        path, _, which = name.removesuffix(".weight").rpartition(".")
        if not path.startswith(f"{_PREFIX}layers.") or which not in ("lora_A", "lora_B"):
            raise ValueError(
                f"{folder / WEIGHTS_NAME}: unexpected tensor {name!r}; expected {_PREFIX}layers.N.*.lora_A/B.weight"
            )
        pairs.setdefault(path.removeprefix(f"{_PREFIX}layers."), {})[which] = tensor
    for path, pair in pairs.items():
        linear = modules.get(path)
        if hasattr(linear, "base_layer"):
            raise ValueError(
                f"{folder}: layers.{path} of the model carries an adapter already; expected a model without one: "
                "merge_and_unload() or unload() it"
            )
        if not isinstance(linear, nn.Linear) or set(pair) != {"lora_A", "lora_B"}:
            raise ValueError(
                f"{folder}: adapter for layers.{path} does not fit an encoder of {len(list(layers.children()))} layers"
            )
        rank, (rows, columns) = config["r"], linear.weight.shape
        if pair["lora_A"].shape != (rank, columns) or pair["lora_B"].shape != (rows, rank):
            raise ValueError(
                f"{folder}: layers.{path} has shape {[rows, columns]}, the adapter of rank {rank} "
                f"{list(pair['lora_B'].shape)} x {list(pair['lora_A'].shape)}"
            )
        delta = pair["lora_B"].float() @ pair["lora_A"].float()
        merged = linear.weight.float() + scaling * delta.to(linear.weight.device)
        linear.weight = nn.Parameter(merged.to(linear.weight.dtype), requires_grad=False)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        config = json.loads((folder / CONFIG_NAME).read_text())
        if config["peft_type"] != "LORA" or config.get("bias", "none") != "none" or config.get("use_dora"):
            raise ValueError("expected a plain LoRA adapter without biases or DoRA")
        if config.get("alpha_pattern") or config.get("rank_pattern"):
            raise ValueError("expected one rank and one alpha for all layers, without patterns")
        start = config.get("init_lora_weights", True)
        if start not in _STARTS_ON_THE_BASE:
            raise ValueError(
                f"init_lora_weights is {start!r}, which changes the base weights that it is added to; expected one "
                "that peft has converted: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
            )
        for name, value in config.items():
            if name not in _WITHOUT_EFFECT and value not in (None, False, "", [], {}):
                raise ValueError(f"{name} is {value!r:.60}, which this does not merge; expected a plain LoRA adapter")
        if not (isinstance(config["r"], int) and config["r"] > 0):
            raise ValueError(f"r: got {config['r']!r}, expected a positive integer")
        if not isinstance(config["lora_alpha"], int | float):
            raise ValueError(f"lora_alpha: got {config['lora_alpha']!r}, expected a number")
        return config, load_file(folder / WEIGHTS_NAME)
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder}: not a LoRA adapter in peft format ({error})") from error
