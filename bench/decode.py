"""A decode step's attention over pruned caches, and over the full one, through the layers that `generate` uses.

One layer of Mistral-7B's shape after 16,384 tokens, pruned 8x. A step adds a token to the layer and lets its query look
at what is held; then the token is taken back. The full cache is read twice: as transformers keeps it, which copies it
in every step, and in a layer of this project that has pruned nothing.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bench import measure
from bench.case import OURS
from bench.goal import Goal
from bench.run import timed
from condense_core import ops
from condense_core.pruning.extras import Extras
from condense_core.pruning.layers import UniformLayer
from condense_core.pruning.ragged import RaggedLayer

PRUNED = 8
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
GOAL = Goal("speed-up", 4.0, "full cache")
LAYOUTS = ("uniform", "ragged")


def record(layout: str, dtype: torch.dtype, *, tokens: int = 16_384, seconds: float = 0.8) -> dict[str, Any]:
    """A step over heads of one length (`uniform`) or of different lengths (`ragged`), beside the full cache."""
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, KV_HEADS, tokens, HEAD_DIM, generator=generator).to(dtype) for _ in range(2))
    q, k_new, v_new = (
        torch.randn(1, heads, 1, HEAD_DIM, generator=generator).to(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    full, plain = UniformLayer(), DynamicLayer()
    full.hold(k, v, tokens)
    plain.update(k, v)
    ours = _uniform(k, v) if layout == "uniform" else _ragged(k, v, generator)
    calls = {
        OURS: [partial(ours, q, k_new, v_new)],
        "full cache": [partial(_step, full, q, k_new, v_new)],
        "DynamicLayer": [partial(_step, plain, q, k_new, v_new)],
    }
    torch.testing.assert_close(calls["full cache"][0](), calls["DynamicLayer"][0]())
    times = measure.interleaved(calls, torch.device("cpu"), seconds=seconds)
    return {
        "name": layout,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": f"{tokens:,} tokens, 1/{PRUNED} kept, {HEADS}/{KV_HEADS} heads, d {HEAD_DIM}",
        **timed(times, (GOAL,), {}),
    }


def _step(layer: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One token through a layer that ordinary attention reads."""
    module: Any = SimpleNamespace(num_key_value_groups=HEADS // KV_HEADS, is_causal=True)
    keys, values = layer.update(k, v)
    out: Tensor = sdpa_attention_forward(module, q, keys, values, None, scaling=HEAD_DIM**-0.5)[0]
    layer.crop(-1)
    return out


def _uniform(k: Tensor, v: Tensor) -> Callable[..., Tensor]:
    """The first rows of every head."""
    tokens, layer = k.shape[2], UniformLayer()
    kept = slice(0, tokens // PRUNED)
    positions = torch.arange(tokens // PRUNED).expand(1, KV_HEADS, -1)
    layer.hold_kept(k[:, :, kept].clone(), v[:, :, kept].clone(), positions, tokens)
    return partial(_step, layer)


def _ragged(k: Tensor, v: Tensor, generator: torch.Generator) -> Callable[..., Tensor]:
    """As many rows, spread unevenly over the heads, as AdaKV leaves them."""
    tokens = k.shape[2]
    scores = torch.randn(1, KV_HEADS, tokens, generator=generator) + torch.linspace(0, 2, KV_HEADS)[:, None]
    indices, counts = ops.select(scores, tokens // PRUNED, scope="layer")
    offsets = torch.cat([counts.new_zeros(1, 1), counts.cumsum(1)], 1)[0].int()
    keys, values = ops.compact(k, v, indices[0], cu_indices=offsets)
    layer = RaggedLayer(keys, values, offsets, batch=1, kv_heads=KV_HEADS, positions=indices[0], seen=tokens)
    layer.in_session = True

    def step(q: Tensor, k_new: Tensor, v_new: Tensor) -> Tensor:
        out = layer.attend(q, k_new, v_new, None, Extras(HEAD_DIM**-0.5))
        layer.crop(-1)
        return out

    return step
