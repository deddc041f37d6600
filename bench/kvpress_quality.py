"""The questions of `bench.pruning_quality` answered through kvpress, in an environment that has kvpress 0.5.5.

It knows nothing of condense_core: contexts, questions and answers come as token ids.

    python -m bench.pruning_quality OURS.json --model FOLDER --corpus valid.jsonl.xz --prompts prompts.json
    KVPRESS_PYTHON bench/kvpress_quality.py prompts.json theirs.json --model FOLDER [--check]
    python -m bench.pruning_quality theirs.json --model FOLDER --score prompts.json

A context is read once; each press compresses what its layers computed (`compress`), which is what its hook calls in a
prefill; `--check` compares both on the first context and ends. KVzip reads the context again and so prefills its own.
theirs.json grows with every cell, and a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpress
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

SHARES = (0.5, 0.25, 0.125)
PRESSES: dict[str, Any] = {
    "kvzip": kvpress.KVzipPress,
    "snapkv": kvpress.SnapKVPress,
    "expected_attention": kvpress.ExpectedAttentionPress,
    "keydiff": kvpress.KeyDiffPress,
    "compactor": kvpress.CompactorPress,
    "streaming_llm": kvpress.StreamingLLMPress,
    "tova": kvpress.TOVAPress,
    "knorm": kvpress.KnormPress,
    "lagkv": kvpress.LagKVPress,
    "adakv(snapkv)": lambda ratio: kvpress.AdaKVPress(kvpress.SnapKVPress(ratio)),
    "adakv(expected_attention)": lambda ratio: kvpress.AdaKVPress(kvpress.ExpectedAttentionPress(ratio)),
    "chunkkv(snapkv)": lambda ratio: kvpress.ChunkKVPress(kvpress.SnapKVPress(ratio)),
    "criticalkv(snapkv)": lambda ratio: kvpress.CriticalKVPress(kvpress.SnapKVPress(ratio)),
    "pyramidkv(snapkv)": kvpress.PyramidKVPress,
}


class Dense:
    """A context, read once: the input of every attention layer, and the keys and values behind it."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        self.model, self.cache = model, DynamicCache()
        self.calls: list[tuple[Any, dict[str, Any], Any]] = []

        def hook(module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
            self.calls.append((module, kwargs, output[1]))

        handles = [layer.self_attn.register_forward_hook(hook, with_kwargs=True) for layer in model.model.layers]
        try:
            model.model(input_ids=ids, past_key_values=self.cache)
        finally:
            for handle in handles:
                handle.remove()

    def compressed(self, press: Any) -> DynamicCache:
        """The cache that ``press`` leaves."""
        press.post_init_from_model(self.model)
        cache = DynamicCache()
        for index, (module, kwargs, attentions) in enumerate(self.calls):
            module.rotary_emb = self.model.model.rotary_emb
            layer = self.cache.layers[index]
            hidden = kwargs["hidden_states"]
            cache.update(*press.compress(module, hidden, layer.keys, layer.values, attentions, kwargs), index)
        return cache


def prefilled(model: Any, ids: Tensor, press: Any) -> DynamicCache:
    """The cache of an ordinary prefill with ``press``."""
    cache = DynamicCache()
    with press(model):
        model.model(input_ids=ids, past_key_values=cache)
    return cache


def clear(model: Any) -> None:
    """Forget what the latest press has masked."""
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None


class Batch:
    """``cache`` once for each of ``rows``, token ids that follow it from position ``start`` on, padded on the left."""

    def __init__(self, model: Any, cache: DynamicCache, rows: list[list[int]], start: int) -> None:
        self.model, self.count, self.cache = model, len(rows), DynamicCache()
        for index, layer in enumerate(cache.layers):
            self.cache.update(*(t.repeat(self.count, 1, 1, 1) for t in (layer.keys, layer.values)), index)
        self.masked = [getattr(layer.self_attn, "masked_key_indices", None) for layer in model.model.layers]
        width = max(map(len, rows))
        self.ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        self.real = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        self.positions = start + (self.real.cumsum(1) - 1).clamp(min=0)

    def __enter__(self) -> Batch:
        for layer, masked in zip(self.model.model.layers, self.masked, strict=True):
            if masked is not None:
                _, heads, places = masked
                row = torch.arange(self.count).repeat_interleave(len(heads))
                layer.self_attn.masked_key_indices = row, heads.repeat(self.count), places.repeat(self.count)
        return self

    def __exit__(self, *_: object) -> None:
        for layer, masked in zip(self.model.model.layers, self.masked, strict=True):
            layer.self_attn.masked_key_indices = masked

    def read(self, ids: Tensor, positions: Tensor, keep: int) -> Tensor:
        """Logits ``[B, keep, V]`` of the last ``keep`` of ``ids [B, Q]``."""
        held = [layer.keys.shape[2] for layer in self.cache.layers]
        new = ids.shape[1]
        masks = {}
        for count in set(held):
            before = count - (self.real.shape[1] - new)
            seen = torch.cat([self.real.new_ones(self.count, before), self.real], 1).bool()
            causal = torch.ones(new, count + new, dtype=torch.bool).tril(count)
            allowed = (seen[:, None] & causal) | torch.eye(new, count + new, dtype=torch.bool).roll(count, 1)
            masks[count] = torch.zeros(allowed.shape, dtype=self.model.dtype).masked_fill(~allowed, float("-inf"))[
                :, None
            ]
        if len(masks) > 1:
            raise ValueError(f"layers hold {sorted(masks)} tokens, which one mask does not describe")
        out = self.model(
            input_ids=ids,
            attention_mask=masks[held[0]],
            position_ids=positions,
            past_key_values=self.cache,
            logits_to_keep=keep,
        )
        return out.logits.float()


def answered(model: Any, cache: DynamicCache, prompt: dict[str, Any], max_new_tokens: int) -> dict[str, Any]:
    """Greedy answers to all questions, as token ids, and the losses of the expected ones."""
    eos = model.generation_config.eos_token_id
    stops = set(eos if isinstance(eos, list) else [eos])
    start = len(prompt["context"])
    with Batch(model, cache, prompt["questions"], start) as batch:
        logits, positions = batch.read(batch.ids, batch.positions, 1), batch.positions[:, -1:]
        said: list[list[int]] = [[] for _ in prompt["questions"]]
        for step in range(max_new_tokens):
            new = logits[:, -1].argmax(-1)
            for row, token in zip(said, new.tolist(), strict=True):
                if not row or row[-1] not in stops:
                    row.append(token)
            if step == max_new_tokens - 1 or all(row[-1] in stops for row in said):
                break
            batch.real = torch.cat([batch.real, batch.real.new_ones(batch.count, 1)], 1)
            positions = positions + 1
            logits = batch.read(new[:, None], positions, 1)
    rows = [[*q, *a] for q, a in zip(prompt["questions"], prompt["answers"], strict=True)]
    with Batch(model, cache, rows, start) as batch:
        keep = max(map(len, prompt["answers"])) + 1
        logits = batch.read(batch.ids, batch.positions, keep)
    losses = [
        float(F.cross_entropy(logits[i, -len(a) - 1 : -1], torch.tensor(a))) for i, a in enumerate(prompt["answers"])
    ]
    return {"said": said, "loss": [round(loss, 5) for loss in losses]}


def check(model: Any, ids: Tensor) -> None:
    """Compare caches of one dense prefill with those of prefills of their own."""
    dense = Dense(model, ids)
    for name, make in PRESSES.items():
        if name == "kvzip":
            continue
        states = []
        for own in (True, False):
            clear(model)
            torch.manual_seed(0)  # Compactor draws a sketch
            cache = prefilled(model, ids, make(0.5)) if own else dense.compressed(make(0.5))
            masked = [getattr(layer.self_attn, "masked_key_indices", None) for layer in model.model.layers]
            states.append(([(layer.keys, layer.values) for layer in cache.layers], masked))
        (one, mask), (other, other_mask) = states
        same = all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))
        for a, b in zip(mask, other_mask, strict=True):
            same &= a is b if a is None or b is None else all(map(torch.equal, a, b))
        print(f"{name}: {'the same' if same else 'DIFFERENT'}", flush=True)


@torch.no_grad()
def main() -> None:
    """Answer what OUT lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(PRESSES))
    parser.add_argument("--shares", type=lambda text: [float(s) for s in text.split(",")], default=list(SHARES))
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--contexts", type=int, default=10**6)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    prompts = json.loads(options.prompts.read_text())[: options.contexts]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if options.check:
        check(model, torch.tensor([prompts[0]["context"]]))
        return
    record: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    record |= {
        "library": f"kvpress {version('kvpress')}",
        "transformers": version("transformers"),
        "dtype": options.dtype,
        "max_new_tokens": options.max_new_tokens,
    }
    contexts = record.setdefault("contexts", [])
    for index, prompt in enumerate(prompts):
        while len(contexts) <= index:
            contexts.append({})
        cells = [(name, share) for name in options.methods for share in options.shares]
        missing = [cell for cell in cells if f"{cell[0]}@{cell[1]:g}" not in contexts[index]]
        if not missing:
            continue
        started, ids = time.monotonic(), torch.tensor([prompt["context"]])
        dense = Dense(model, ids)
        for name, share in missing:
            clear(model)
            press = PRESSES[name](1 - share)
            try:
                cache = prefilled(model, ids, press) if name == "kvzip" else dense.compressed(press)
                cell = answered(model, cache, prompt, options.max_new_tokens)
                cell["texts"] = tokenizer.batch_decode(cell.pop("said"), skip_special_tokens=True)
                cell["bytes"] = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
            except (ValueError, AssertionError, RuntimeError) as error:
                print(f"{name} at {share:g}: {error}")
                cell = None
            contexts[index][f"{name}@{share:g}"] = cell
            options.out.write_text(json.dumps(record) + "\n")
        print(f"context {index + 1} of {len(prompts)}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
