"""Memory over the time of a long prefill: unpruned in one pass and in chunks, and pruned between chunks.

    python -m bench.memory [--plot docs/prefill_memory.png]

Each variant runs in a process of its own; what is counted is the resident memory beyond that with the model loaded,
sampled every two milliseconds by a thread.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from bench.goal import Goal, sentence

TOKENS, KEEP = 16_384, 0.25
VARIANTS = {
    "full": "unpruned, one pass",
    "chunked": "unpruned, in 16 chunks",
    "pruned": "SnapKV, keep 0.25, in 16 chunks",
}
GOAL = Goal("peak", 0.40, "the unpruned prefill")


def model() -> Any:
    """Four layers with Mistral's proportions, a quarter as wide, in fp32; random weights."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=2048,
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        sliding_window=None,
        max_position_embeddings=TOKENS,
        attn_implementation="sdpa",
    )
    return MistralForCausalLM(config).eval()


class Sampler:
    """Resident bytes over time, in a thread, between entering and leaving."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, int]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self.start, self.base = time.perf_counter(), resident()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.002):
            self.samples.append((time.perf_counter() - self.start, resident() - self.base))


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def run(variant: str, tokens: int) -> dict[str, Any]:
    """One prefill: seconds and bytes of each sample (thinned out), the peak, and what the cache holds at the end."""
    import torch
    from transformers import DynamicCache

    from condense_core.pruning import PrunedCache, SnapKV

    decoder, chunk = model(), tokens // 16
    ids = torch.randint(0, 2048, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        decoder.model(ids[:, :128])  # what the first call allocates for good
        with Sampler() as sampler:
            if variant == "pruned":
                cache: Any = PrunedCache.prefill(decoder, ids, SnapKV(keep=KEEP), chunk_size=chunk)
            else:
                cache = DynamicCache(config=decoder.config)
                for part in ids.split(chunk if variant == "chunked" else tokens, dim=1):
                    decoder.model(part, past_key_values=cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    thin = sampler.samples[:: max(1, len(sampler.samples) // 800)]
    peak = max(count for _, count in sampler.samples)
    return {"samples": thin, "peak": peak, "held": held, "seconds": sampler.samples[-1][0]}


def record(*, tokens: int = TOKENS) -> dict[str, Any]:
    """What each variant's process found, and the goal; `RuntimeError` if one failed."""
    variants = {}
    for variant in VARIANTS:
        command = [sys.executable, "-m", "bench.memory", "--worker", variant, "--tokens", str(tokens)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the worker of {variant!r} failed\n{done.stderr[-2000:]}")
        variants[variant] = json.loads(done.stdout.splitlines()[-1])
    goal = GOAL.judge(variants["pruned"]["peak"] / variants["full"]["peak"])
    return {"tokens": tokens, "variants": variants, "goal": goal}


def table(results: dict[str, Any]) -> str:
    """What `record` returned, in Markdown."""
    rows = ["| prefill | peak, MiB | of one pass | cache, MiB | seconds | goal |", "|---" * 6 + "|"]
    for variant, label in VARIANTS.items():
        row = results["variants"][variant]
        peak, held = (row[key] / 2**20 for key in ("peak", "held"))
        share = row["peak"] / results["variants"]["full"]["peak"]
        goal = sentence(results["goal"]) if variant == "pruned" else ""
        rows.append(f"| {label} | {peak:,.0f} | {share:.0%} | {held:,.0f} | {row['seconds']:.1f} | {goal} |")
    return "\n".join(rows)


def plot(results: dict[str, Any], path: Path) -> None:
    """Memory over time, a line for each variant of what `record` returned."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    variants = results["variants"]
    for (variant, label), colour in zip(VARIANTS.items(), ("#8c8c8c", "#d9822b", "#1f6fb2"), strict=True):
        seconds, used = zip(*variants[variant]["samples"], strict=True)
        peak = variants[variant]["peak"] / 2**20
        axes.plot(seconds, [b / 2**20 for b in used], color=colour, label=f"{label}: peak {peak:,.0f} MiB")
    axes.set(
        xlabel="seconds",
        ylabel="MiB beyond the model",
        title=f"Prefill of {results['tokens']:,} tokens, 4 layers, fp32, CPU",
    )
    highest = max(row["peak"] for row in variants.values()) / 2**20
    axes.set_ylim(0, 1.35 * highest)  # room for the legend above the lines
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="upper right")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run every variant, print a table, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="write a PNG here")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=list(VARIANTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(run(options.worker, options.tokens)))
        return
    results = record(tokens=options.tokens)
    print(table(results))
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
