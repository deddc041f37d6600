"""How long Mistral-7B would read a text on cards of 24 GB, calculated from shapes: the table of docs/encoder.md.

    python -m condense_core.profiling.calculated

Nothing is measured here, and no value of a model is allocated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from condense_core.profiling.configs import model_config
from condense_core.profiling.cost import activation_bytes, encode_flops, layer_bytes, weight_bytes
from condense_core.profiling.encode import EncodeSettings, benchmark_compressor
from condense_core.profiling.random_model import decoder_shape

LAYERS = (8, 32)
CARDS = {"GeForce RTX 3090": 71, "RTX A5000": 111, "L4": 121, "A10": 125, "GeForce RTX 4090": 165}
"""Dense bf16 products with sums in fp32, TFLOP/s: half of what makers print for sparse weights, and not the higher
figure of sums in fp16. Assumed from what they publish, and not looked up again. Ascending."""
SHARE = 0.4
"""Of these that a layer's products are assumed to reach."""


@dataclass(frozen=True)
class Cost:
    """Of compressing one context: its tokens, operations, and bytes of weights and of what a layer holds at once."""

    tokens: int
    flops: int
    weight_bytes: int
    activation_bytes: int

    def seconds(self, tflops: float) -> float:
        """Of the operations, at ``SHARE`` of a peak."""
        return self.flops / (SHARE * tflops * 1e12)


def cost(layers: int, model: str = "mistral-7b") -> Cost:
    """What the first ``layers`` layers of ``model`` and the compressor's head take in bf16, for 7,000 characters."""
    settings = EncodeSettings(layers=(layers,))
    config: Any = model_config(model)
    [tokens] = settings.lengths(1)
    shape = decoder_shape(config, torch.bfloat16)
    with torch.device("meta"):
        compressor = benchmark_compressor(shape, layers, settings)
    flops = encode_flops(compressor, config, [tokens], settings.ratio)
    assert flops is not None
    head = weight_bytes(compressor) - sum(p.nbytes for p in compressor.encoder.layers.parameters())
    held = activation_bytes(config, tokens, torch.bfloat16.itemsize)
    return Cost(tokens, flops, layer_bytes(shape, layers) + head, held)


def table() -> str:
    """The cards with the calculated times, in Markdown."""
    costs = [cost(layers) for layers in LAYERS]
    names = [f"{layers} layers" for layers in LAYERS]
    lines = [f"| {costs[0].tokens:,} tokens | {' | '.join(names)} |", "|---|" + "---|" * len(costs)]
    rows = {
        "operations": [f"{c.flops / 1e12:.2f} TFLOP" for c in costs],
        "weights in bf16, with embeddings and head": [f"{c.weight_bytes / 1e9:.2f} GB" for c in costs],
        "what a layer holds at once": [f"{c.activation_bytes / 1e9:.2f} GB" for c in costs],
        **{f"{card}, {peak} TFLOP/s": [f"{c.seconds(peak):.2f} s" for c in costs] for card, peak in CARDS.items()},
    }
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
