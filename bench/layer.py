"""One attention layer after its prefill, pruned by this project and by kvpress, from the same tensors.

kvpress 0.5.5 itself runs where it is installed (it needs transformers below 5.3, this project's pruning ops need torch
alone); otherwise its formulas do, from `bench.baselines`, with the same projections that it recomputes. This project is
given the queries that attention computed, as its hooks capture them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import baselines, measure
from bench.case import OURS
from bench.goal import Goal
from bench.run import timed
from condense_core import ops

SINK, WINDOW, FUTURE = 4, 64, 512
Pair = tuple[Tensor, Tensor]


@dataclass
class Layer:
    """What the layer leaves behind. n tokens, H query heads, G KV heads, D head_dim, width d_model.

    Attributes:
        attention: the module of transformers.
        hidden: `[1, n, width]`, its input.
        q: `[1, H, n, D]` after RoPE; k, v: `[1, G, n, D]`.
        position: cos and sin, `[1, n, D]`; future: the same of the next `FUTURE` positions.
    """

    attention: Any
    hidden: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    position: Pair
    future: Callable[[], Pair]

    @property
    def budget(self) -> int:
        """Half of the tokens."""
        return self.k.shape[2] // 2


def mistral(num_tokens: int, dtype: torch.dtype, *, heads: int = 32, kv_heads: int = 8, width: int = 4096) -> Layer:
    """A layer of Mistral-7B's shape with random weights and input."""
    from transformers import MistralConfig
    from transformers.models.mistral.modeling_mistral import (
        MistralAttention,
        MistralRotaryEmbedding,
        apply_rotary_pos_emb,
    )

    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width // heads,
        sliding_window=None,
        attn_implementation="sdpa",
    )
    attention = MistralAttention(config, 0).to(dtype).eval()
    attention.rotary_emb = rotary = MistralRotaryEmbedding(config)  # where kvpress looks for it
    hidden = torch.randn(1, num_tokens, width).to(dtype)
    position = rotary(hidden, torch.arange(num_tokens)[None])
    with torch.no_grad():
        q, k, v = (
            projection(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *position)
    # k and v as a cache holds them; q as attention has it, a view of the projection.
    later = torch.arange(num_tokens, num_tokens + FUTURE)[None]
    return Layer(attention, hidden, q, k.contiguous(), v.contiguous(), position, lambda: rotary(hidden, later))


# --- this project


def _keep(layer: Layer, scores: Tensor) -> Pair:
    indices, _ = ops.select(scores, layer.budget)
    k, v = ops.compact(layer.k, layer.v, indices)
    return k, v


def _window_scores(layer: Layer) -> Tensor:
    return ops.window_scores(layer.q[:, :, -WINDOW:], layer.k)


def _expected_attention(layer: Layer) -> Tensor:
    mu, cov = ops.query_moments(layer.q, *layer.position, sink=SINK)
    cos, sin = (t[0].float().mean(0) for t in layer.future())
    return ops.expected_attention(layer.k, layer.v, mu, cov, mean_cos=cos, mean_sin=sin, sink=SINK)


def _critical(layer: Layer) -> Tensor:
    scores = _window_scores(layer)
    first, _ = ops.select(scores, layer.budget // 2)
    scores = (scores + 1e-4) * ops.value_projection_norm(layer.v, layer.attention.o_proj.weight)
    return scores.scatter_(-1, first, float("inf"))


METHODS: dict[str, Callable[[Layer], Pair]] = {
    "Knorm": lambda layer: _keep(layer, ops.key_norm(layer.k)),
    "KeyDiff": lambda layer: _keep(layer, ops.key_similarity(layer.k)),
    "LagKV": lambda layer: _keep(layer, ops.lag_scores(layer.k, layer.v, sink=SINK)),
    "SnapKV": lambda layer: _keep(layer, _window_scores(layer)),
    "ExpectedAttention": lambda layer: _keep(layer, _expected_attention(layer)),
    "CriticalKV(SnapKV)": lambda layer: _keep(layer, _critical(layer)),
}
"""Score, select and compact with half of the tokens kept, by method."""

GOALS = {
    "Knorm": (1.5, 1.5),
    "KeyDiff": (3.0, 3.0),
    "LagKV": (8.0, 8.0),
    "SnapKV": (3.0, 3.0),
    "ExpectedAttention": (10.0, 10.0),
    "CriticalKV(SnapKV)": (2.0, 4.0),
}
"""Speed-ups over kvpress, in fp32 and in 16 bits."""

# The share of kept keys that must be kvpress's, in fp32 and in 16 bits. Scores tie: in 16 bits, where they also lose
# digits on the way, and those of LagKV, which are ranks inside chunks, at the last place everywhere.
COMMON = {"LagKV": (0.98, 0.8), "SnapKV": (0.999, 0.8)}


def record(method: str, layer: Layer, *, seconds: float = 1.0) -> dict[str, Any]:
    """Time a method beside kvpress, once both keep the same keys up to ties; `correct` says whether they do."""
    dtype = layer.k.dtype
    place = int(dtype.itemsize == 2)
    name, theirs = rival(method, layer)
    ours = torch.no_grad()(lambda: METHODS[method](layer))
    kept = [{bytes(row) for row in k.flatten(0, 2).view(torch.uint8).numpy()} for k, _ in (ours(), theirs())]
    common = len(kept[0] & kept[1]) / len(kept[0])
    device = torch.device("cpu")
    times = measure.interleaved({OURS: [ours], name: [theirs]}, device, seconds=seconds)
    temporaries = measure.temporaries(ours, device) if method == "SnapKV" else None
    goals: tuple[Goal, ...] = (Goal("speed-up", GOALS[method][place], "kvpress"),)
    if method == "SnapKV":
        goals += (Goal("temporaries", 4.0),)
    correct = common >= COMMON.get(method, (0.999, 0.9))[place]
    reached = {"temporaries": None if temporaries is None else temporaries / 2**20}
    return {
        "name": method,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": "n {2:,}, {heads}/{1} heads, d {3}, half kept".format(*layer.k.shape, heads=layer.q.shape[1]),
        "common": common,
        "correct": correct,
        **timed(times, goals if correct else (), reached, show=correct),
    }


# --- kvpress


def rival(method: str, layer: Layer) -> tuple[str, Callable[[], Pair]]:
    """kvpress where it is installed, else its formulas: a name, and the call."""
    if find_spec("kvpress") is None:
        return "kvpress's formulas", lambda: _restated(method, layer)
    return "kvpress", _press(method, layer)


def _press(method: str, layer: Layer) -> Callable[[], Pair]:
    import kvpress

    presses: dict[str, Callable[[], Any]] = {
        "Knorm": lambda: kvpress.KnormPress(0.5),
        "KeyDiff": lambda: kvpress.KeyDiffPress(0.5),
        "LagKV": lambda: kvpress.LagKVPress(0.5),
        "SnapKV": lambda: kvpress.SnapKVPress(0.5),
        "ExpectedAttention": lambda: kvpress.ExpectedAttentionPress(0.5),
        "CriticalKV(SnapKV)": lambda: kvpress.CriticalKVPress(kvpress.SnapKVPress(0.5)),
    }
    press = presses[method]()
    options = {"position_embeddings": layer.position}

    def compress() -> Pair:
        with torch.no_grad():
            pair: Pair = press.compress(layer.attention, layer.hidden, layer.k, layer.v, None, options)
        return pair

    return compress


@torch.no_grad()
def _restated(method: str, layer: Layer) -> Pair:
    k, v = layer.k, layer.v
    if method == "Knorm":
        scores = baselines.knorm(k)
    elif method == "KeyDiff":
        scores = baselines.keydiff(k)
    elif method == "LagKV":
        scores = baselines.lagkv(k, v, sink=SINK)
    elif method == "ExpectedAttention":
        mu, cov = baselines.query_statistics(_project(layer.attention.q_proj, layer.hidden[:, SINK:], k))
        rotation = baselines.mean_rotation(*(t[0] for t in layer.future()))
        scores = baselines.expected_attention(k, v, mu @ rotation.T, rotation @ cov @ rotation.T, sink=SINK)
    else:
        window = _project(layer.attention.q_proj, layer.hidden[:, -WINDOW:], k)
        cos, sin = (t[:, None, -WINDOW:] for t in layer.position)
        low, high = window.chunk(2, -1)
        scores = baselines.snapkv(window * cos + torch.cat([-high, low], -1) * sin, k)
        if method == "CriticalKV(SnapKV)":
            first = scores.topk(layer.budget // 2).indices
            norms = baselines.value_projection(v, layer.attention.o_proj.weight, heads=layer.q.shape[1])
            scores = ((scores + 1e-4) * norms).scatter_(-1, first, torch.finfo(scores.dtype).max)
    return baselines.keep(k, v, scores, layer.budget)


def _project(projection: nn.Linear, hidden: Tensor, k: Tensor) -> Tensor:
    return F.linear(hidden, projection.weight).unflatten(-1, (-1, k.shape[3])).transpose(1, 2)
