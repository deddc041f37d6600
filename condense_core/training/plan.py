"""What a training run will need, before it starts: parameters and memory, from the model's shapes alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from condense_core.compressor.compressor import Compressor
from condense_core.compressor.config import CompressorConfig

#: Published shapes of models that the plan can be made for where no hub can be reached.
KNOWN_CONFIGS: dict[str, dict[str, Any]] = {
    "mistralai/Mistral-7B-Instruct-v0.2": {
        "model_type": "mistral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
}


def meta_model(name: str) -> PreTrainedModel:
    """The model's modules on the meta device: exact shapes, no memory, no weights.

    The config comes from ``name`` (folder or hub id), or from ``KNOWN_CONFIGS`` where that cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        if name not in KNOWN_CONFIGS:
            raise ValueError(f"model: cannot read the config of {name!r} ({str(error).splitlines()[0]})") from error
        known = dict(KNOWN_CONFIGS[name])
        config = AutoConfig.for_model(known.pop("model_type"), **known)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.name_or_path = name
    return model


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one training process, and the parameter counts behind them."""

    decoder_parameters: int
    encoder_parameters: int
    trainable_parameters: int
    weights: int
    gradients_and_optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients_and_optimizer + self.activations + self.logits

    def as_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}

    def lines(self) -> list[str]:
        gib = 2**30
        return [
            f"decoder            {self.decoder_parameters / 1e6:10,.1f} M parameters, frozen",
            f"encoder (shared)   {self.encoder_parameters / 1e6:10,.1f} M parameters, frozen",
            f"trained            {self.trainable_parameters / 1e6:10,.1f} M parameters (adapter, pooler, projection)",
            f"weights            {self.weights / gib:10.2f} GiB",
            f"gradients + AdamW  {self.gradients_and_optimizer / gib:10.2f} GiB",
            f"activations        {self.activations / gib:10.2f} GiB (estimate)",
            f"logits             {self.logits / gib:10.2f} GiB (estimate)",
            f"total              {self.total / gib:10.2f} GiB per process",
        ]


def memory_plan(
    model: PreTrainedModel, config: CompressorConfig, *, tokens: int, answer_tokens: int, checkpointing: bool
) -> MemoryPlan:
    """Estimate for a step over ``tokens`` context tokens, of which ``answer_tokens`` reach the output head.

    Exact for weights, gradients and optimizer (fp32 masters, two moments). Activations: with checkpointing, one
    residual row per token and layer and one layer recomputed; without, about 16 + 6 * intermediate/hidden rows per
    token and layer. The decoder reads about half as many positions as the encoder (ratio 2, the longest case), and
    keeps the activations of all its layers, because gradients pass through it to the soft tokens.
    """
    with torch.device("meta"):
        compressor = Compressor(model, config)
        compressor.attach_lora()
    size = model.config
    width = torch.finfo(model.dtype).bits // 8
    decoder = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in compressor.trainable_parameters())
    encoder = sum(p.numel() for n, p in compressor.encoder.layers.named_parameters() if "lora_" not in n)
    row = tokens * size.hidden_size * width
    per_layer = row * (16 + 6 * size.intermediate_size / size.hidden_size)
    layers = config.encoder_layers + size.num_hidden_layers / 2
    activations = layers * row + per_layer if checkpointing else layers * per_layer
    return MemoryPlan(
        decoder_parameters=decoder,
        encoder_parameters=encoder,
        trainable_parameters=trainable,
        weights=decoder * width + trainable * 4,
        gradients_and_optimizer=trainable * 12,
        activations=int(activations),
        logits=answer_tokens * size.vocab_size * 4 * 4,
    )
