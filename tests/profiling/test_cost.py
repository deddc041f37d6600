"""Operations and bytes counted from shapes, by hand and by brute force."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import MistralConfig, MixtralConfig

from condense_core.compressor.compressor import Compressor
from condense_core.compressor.config import CompressorConfig
from condense_core.profiling.cost import attended_pairs, encode_flops, layer_window, weight_bytes
from condense_core.profiling.random_model import random_first_layers

CPU = torch.device("cpu")
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def pool_compressor(config: MistralConfig, **changes: object) -> Compressor:
    model = random_first_layers(config, 2, device=CPU, dtype=torch.float32)
    settings = {
        "method": "pool",
        "d_model": 32,
        "encoder_layers": 2,
        "num_heads": 4,
        "mlp_hidden": 64,
        "residual": True,
    }
    return Compressor(model, CompressorConfig(**(settings | changes))).eval()


@pytest.mark.parametrize("window", [None, 1, 3, 9, 40])
@pytest.mark.parametrize("length", [1, 2, 9, 17])
def test_attended_pairs(length: int, window: int | None) -> None:
    seen = [(q, k) for q in range(length) for k in range(q + 1) if window is None or q - k < window]
    assert attended_pairs(length, window) == len(seen)


def test_flops_by_hand() -> None:
    config = MistralConfig(**SIZES, **HEADS, sliding_window=None)
    linears = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48)  # query, key and value, output, MLP
    attention = 4 * 32 * (10 * 11 // 2 + 7 * 8 // 2)  # of sequences of 10 and 7 tokens
    pooling, projection = 4 * 17 * 32, 2 * (32 * 64 + 64 * 32) * (3 + 2)
    expected = 2 * (17 * linears + attention) + pooling + projection
    assert encode_flops(pool_compressor(config), config, [10, 7], 4) == expected


def test_linears_are_those_that_torch_counts() -> None:
    config = MistralConfig(**SIZES, **HEADS, sliding_window=None)
    compressor = pool_compressor(config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        compressor.encoder(torch.randn(17, 32), [0, 10, 17])
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    attention = 2 * 4 * 32 * (10 * 11 // 2 + 7 * 8 // 2)
    projection, pooling = 2 * (32 * 64 + 64 * 32) * 5, 4 * 17 * 32
    assert encode_flops(compressor, config, [10, 7], 4) == counted + attention + projection + pooling


def test_a_mixture_of_experts_is_not_counted() -> None:
    config = MixtralConfig(**SIZES, **HEADS, num_local_experts=2)
    assert encode_flops(pool_compressor(config), config, [10], 4) is None


def test_windows_of_layers() -> None:
    mixed = SimpleNamespace(layer_types=["sliding_attention", "full_attention"], sliding_window=8)
    assert [layer_window(mixed, i) for i in range(2)] == [8, None]
    assert layer_window(SimpleNamespace(sliding_window=8), 5) == 8
    assert layer_window(SimpleNamespace(), 5) is None


def test_bytes_of_weights() -> None:
    compressor = pool_compressor(MistralConfig(**SIZES, **HEADS, sliding_window=None), ratios=(4,))
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48 + 2 * 32
    own = 32 + 32 + 4 * 4 + (32 + 32 * 64 + 64 + 64 * 32 + 32 + 2)  # pooler: norm, queries, bias; projection
    assert weight_bytes(compressor) == 4 * (2 * layer + own)
