"""A decode step's attention over pruned caches, and over the full one: `pytest bench/ --benchmark-only`.

One layer of Mistral-7B's shape after 16,384 tokens. A step adds a token to the layer and lets its query look at what is
held, through the same code that `generate` runs; then the token is taken back. The full cache is read twice: as
transformers keeps it, which copies it in every step, and in a layer of this project that has pruned nothing.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bench.conftest import Contest, Goal
from condense_core import ops
from condense_core.ops import native
from condense_core.pruning.layers import UniformLayer
from condense_core.pruning.ragged import RaggedLayer

TOKENS, PRUNED = 16_384, 8
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=f"no extension: {native.missing()}")


def step(layer: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One token through a layer that ordinary attention reads."""
    module: Any = SimpleNamespace(num_key_value_groups=HEADS // KV_HEADS, is_causal=True)
    keys, values = layer.update(k, v)
    out: Tensor = sdpa_attention_forward(module, q, keys, values, None, scaling=HEAD_DIM**-0.5)[0]
    layer.crop(-1)
    return out


def ragged(k: Tensor, v: Tensor, generator: torch.Generator) -> RaggedLayer:
    """As many rows as the others hold, spread unevenly over the heads, as AdaKV leaves them."""
    scores = torch.randn(1, KV_HEADS, TOKENS, generator=generator) + torch.linspace(0, 2, KV_HEADS)[:, None]
    indices, counts = ops.select(scores, TOKENS // PRUNED, scope="layer")
    offsets = torch.cat([counts.new_zeros(1, 1), counts.cumsum(1)], 1)[0].int()
    keys, values = ops.compact(k, v, indices[0], cu_indices=offsets)
    return RaggedLayer(keys, values, offsets, batch=1, kv_heads=KV_HEADS, positions=indices[0], seen=TOKENS)


@pytest.mark.parametrize("layout", ["uniform", "ragged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_decode_step(contest: Contest, dtype: torch.dtype, layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (1, KV_HEADS, TOKENS, HEAD_DIM)
    k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    q, k_new, v_new = (
        torch.randn(1, heads, 1, HEAD_DIM, generator=generator).to(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    full, plain = UniformLayer(), DynamicLayer()
    full.hold(k, v, TOKENS)
    plain.update(k, v)
    ours: Callable[[], Tensor]
    if layout == "uniform":
        layer = UniformLayer()
        kept = slice(0, TOKENS // PRUNED)
        positions = torch.arange(TOKENS // PRUNED).expand(1, KV_HEADS, -1)
        layer.hold_kept(k[:, :, kept].clone(), v[:, :, kept].clone(), positions, TOKENS)
        ours = lambda: step(layer, q, k_new, v_new)  # noqa: E731  # the contest wants a call without arguments
    else:
        rows = ragged(k, v, generator)
        rows.in_session = True

        def ours() -> Tensor:
            out = rows.attend(q, k_new, v_new, None, HEAD_DIM**-0.5)
            rows.crop(-1)
            return out

    rivals = {
        "full cache": lambda: step(full, q, k_new, v_new),
        "DynamicLayer": lambda: step(plain, q, k_new, v_new),
    }
    torch.testing.assert_close(rivals["full cache"](), rivals["DynamicLayer"]())
    contest(ours, rivals, (Goal("full cache", 4.0),))
