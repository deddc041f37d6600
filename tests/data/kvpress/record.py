"""Records what kvpress scores and keeps, for tests/pruning/test_kvpress.py.

A developer runs this in an environment with ``kvpress==0.5.5`` and ``transformers==5.2.0``:

    python tests/data/kvpress/record.py

It makes three random Mistral layers on the CPU and writes ``scores.safetensors`` beside itself: of each layer the input
and the weights in float16 (all is computed in float32 from these), under ``<layer>/``; each press's scores, under
``<layer>/<method>``; where a press does more than rank its scores, the kept tokens, under ``<layer>/<method>/kept``.
The metadata names versions, layers, and for each method its settings in this project's terms.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpress
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import MistralConfig
from transformers.models.mistral.modeling_mistral import (
    MistralAttention,
    MistralRotaryEmbedding,
    apply_rotary_pos_emb,
    repeat_kv,
)

# 204 tokens: full chunks for NonCausal (51), for Compactor between its sinks and window (64) and for ChunkKV (12), as
# kvpress's mask of a last chunk that is not full is wrong.
TOKENS, WIDTH, KEEP, CONTEXT = 204, 24, 0.5, 120
LAYERS = {
    "32-8": {"heads": 32, "kv_heads": 8, "head_dim": 16},
    "8-2": {"heads": 8, "kv_heads": 2, "head_dim": 32},
    "4-1": {"heads": 4, "kv_heads": 1, "head_dim": 16},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "streaming_llm": {"sink": 4},
    "knorm": {},
    "keydiff": {},
    "qfilter": {},
    "lagkv": {"sink": 4, "lag": 32},
    "snapkv": {"window": 16, "kernel_size": 5},
    "tova": {},
    "finch": {"window": 12},
    "observed_attention": {},
    "expected_attention": {"sink": 4, "future": 512, "epsilon": 0.02},
    "leverage": {"sketch": 8},
    "non_causal": {"chunk": 51},
    "compactor": {"sink": 8, "window": 4, "chunk": 64, "sketch": 8},
    "kvzip": {"sink": 4},
    # Wrappers around SnapKV with the settings above; ChunkKV's window is whole chunks, so that none is mixed, and what
    # it keeps is such that the best chunk that goes is clearly worse than the worst that stays.
    "criticalkv": {"epsilon": 1e-4, "first_share": 0.5},
    "chunkkv": {"chunk": 12, "window": 24, "keep": 0.6},
}


def make_layer(index: int, heads: int, kv_heads: int, head_dim: int) -> tuple[Any, Tensor]:
    """A layer, and its input ``[1, n, width]``; both hold numbers of float16 in float32."""
    torch.manual_seed(index)
    config = MistralConfig(
        hidden_size=WIDTH,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        num_hidden_layers=1,
        sliding_window=None,
    )
    module = MistralAttention(config, 0).eval()
    for weight in module.parameters():
        # Queries and keys of a size that makes attention uneven.
        weight.data = (1.5 * torch.randn_like(weight) / WIDTH**0.5).half().float()
    module.rotary_emb = MistralRotaryEmbedding(config)
    return module, torch.randn(1, TOKENS, WIDTH).half().float()


@torch.no_grad()
def record(name: str, index: int) -> dict[str, Tensor]:
    module, hidden = make_layer(index, **LAYERS[name])
    position = module.rotary_emb(hidden, torch.arange(TOKENS)[None])
    q, k, v = (
        projection(hidden).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, *position)
    groups = q.shape[1] // k.shape[1]
    logits = module.scaling * q @ repeat_kv(k, groups).mT
    attention = (logits + torch.full((TOKENS, TOKENS), -torch.inf).triu(1)).softmax(-1)
    options = {"position_embeddings": position}

    def score(press: Any, attentions: Tensor | None = None) -> Tensor:
        scores: Tensor = press.score(module, hidden, k, v, attentions, options)
        return scores[0].float()

    inputs = {key: getattr(module, key).weight for key in ("q_proj", "k_proj", "v_proj", "o_proj")}
    out = {key: tensor.half() for key, tensor in {**inputs, "hidden": hidden[0]}.items()}
    ratio, s = 1 - KEEP, SETTINGS

    if name == "4-1":
        # kvpress adds up the heads of a layer for ChunkKV: with one of them there is nothing to add.
        snap = kvpress.SnapKVPress(1 - s["chunkkv"]["keep"], s["chunkkv"]["window"], 5)
        press = kvpress.ChunkKVPress(snap, s["chunkkv"]["chunk"])
        places = torch.arange(TOKENS).float().view(1, 1, -1, 1).expand_as(v)
        _, kept = press.compress(module, hidden, k, places, None, options)
        out["chunkkv/kept"] = kept[0, :, :, 0].to(torch.int16)
        return out

    qfilter = kvpress.QFilterPress(ratio)
    out["qfilter/filters"] = torch.randn(1, k.shape[1], module.head_dim)
    qfilter.q_filters = out["qfilter/filters"]
    finch = kvpress.FinchPress(ratio)
    finch.window_size = s["finch"]["window"]
    expected = s["expected_attention"]
    presses = {
        "streaming_llm": kvpress.StreamingLLMPress(ratio, s["streaming_llm"]["sink"]),
        "knorm": kvpress.KnormPress(ratio),
        "keydiff": kvpress.KeyDiffPress(ratio),
        "qfilter": qfilter,
        "lagkv": kvpress.LagKVPress(ratio, s["lagkv"]["sink"], s["lagkv"]["lag"]),
        "snapkv": kvpress.SnapKVPress(ratio, s["snapkv"]["window"], s["snapkv"]["kernel_size"]),
        "tova": kvpress.TOVAPress(ratio),
        "finch": finch,
        "expected_attention": kvpress.ExpectedAttentionPress(
            ratio, expected["future"], expected["sink"], epsilon=expected["epsilon"]
        ),
        "non_causal": kvpress.NonCausalAttnPress(ratio, s["non_causal"]["chunk"]),
        "criticalkv": kvpress.CriticalKVPress(
            kvpress.SnapKVPress(ratio, s["snapkv"]["window"], s["snapkv"]["kernel_size"]),
            s["criticalkv"]["epsilon"],
            s["criticalkv"]["first_share"],
        ),
    }
    out |= {method: score(press) for method, press in presses.items()}
    out["observed_attention"] = score(kvpress.ObservedAttentionPress(ratio), attention)

    # Both draw their sketch first of all from the global generator.
    c = s["compactor"]
    sketched = {
        "leverage": kvpress.LeverageScorePress(ratio, s["leverage"]["sketch"]),
        "compactor": kvpress.CompactorPress(ratio, c["sink"], c["window"], c["chunk"], c["sketch"]),
    }
    for method, press in sketched.items():
        torch.manual_seed(100 + index)
        out[method] = score(press)
    torch.manual_seed(100 + index)
    out["phi"] = torch.randn(1, k.shape[1], module.head_dim, c["sketch"])[0] / c["sketch"] ** 0.5

    # The last tokens are what is read again behind a context of one chunk.
    kvzip = kvpress.KVzipPress(ratio, n_sink=s["kvzip"]["sink"])
    kvzip.context_length = kvzip.end_idx = CONTEXT
    kvzip.score_val = torch.zeros(1, 1, k.shape[1], CONTEXT)
    again = {"position_embeddings": tuple(t[:, CONTEXT:] for t in position)}
    kvzip.score_kvzip(module, hidden[:, CONTEXT:], k, v, None, again)
    out["kvzip"] = kvzip.score_val[0, 0]
    return out


def main() -> None:
    torch.set_num_threads(1)
    tensors = {
        f"{name}/{key}": tensor.contiguous()
        for index, name in enumerate(LAYERS)
        for key, tensor in record(name, index).items()
    }
    about = {
        "kvpress": version("kvpress"),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "layers": json.dumps(LAYERS),
        "settings": json.dumps(SETTINGS),
        "keep": str(KEEP),
        "context": str(CONTEXT),
        "rope_theta": "10000.0",
    }
    path = Path(__file__).with_name("scores.safetensors")
    save_file(tensors, path, about)
    print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
