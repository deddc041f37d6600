"""What pruning adds to a prefill: this project and kvpress, each in its own environment, in turns.

    python bench/prefill.py                                      # this project alone
    python bench/prefill.py --kvpress /path/to/its/bin/python    # beside kvpress (transformers below 5.3)
    python bench/prefill.py --device cuda                        # on a GPU, where no goal is set

A process runs one engine: prefills with and without pruning alternate, call by call, and the overhead is the median of
the differences between neighbours over the median prefill. The driver starts processes of both engines in turns and
takes the median over them. This file is the
worker too, so it imports neither engine before it knows which one it is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

TOKENS, ROUNDS = 2048, 40
# Goal of this project, percent of the prefill.
METHODS = {"Knorm": 1, "SnapKV": 4, "ExpectedAttention": 3, "LagKV": 3, "CriticalKV(SnapKV)": 12, "Compactor": 20}


def ours(method: str, model: Any) -> Callable[[], Any]:
    """A new session that keeps half."""
    from condense_core import pruning
    from condense_core.pruning import CriticalKV, SnapKV

    chosen = CriticalKV(SnapKV(keep=0.5)) if method == "CriticalKV(SnapKV)" else getattr(pruning, method)(keep=0.5)
    return lambda: pruning.prune(model, chosen)


def kvpress(method: str, model: Any) -> Callable[[], Any]:
    """The same as its users write it."""
    import kvpress

    if method == "CriticalKV(SnapKV)":
        press = kvpress.CriticalKVPress(kvpress.SnapKVPress(compression_ratio=0.5))
    else:
        press = getattr(kvpress, f"{method}Press")(compression_ratio=0.5)
    return lambda: press(model)


def measure(engine: str, methods: list[str], device: str) -> dict[str, dict[str, float]]:
    """Milliseconds of a prefill without and with each method, and the overhead in percent."""
    import torch
    from transformers import DynamicCache, MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=None,
        max_position_embeddings=4096,
        attn_implementation="sdpa",
    )
    model = MistralForCausalLM(config).eval().to(device)
    ids = torch.randint(0, 2048, (1, TOKENS)).to(device)
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def prefill(block: Callable[[], Any]) -> float:
        wait()
        start = time.perf_counter()
        with torch.no_grad(), block():
            model(ids, past_key_values=DynamicCache(), logits_to_keep=1)
        wait()
        return (time.perf_counter() - start) * 1e3

    results = {}
    for method in methods:
        block = {"ours": ours, "kvpress": kvpress}[engine](method, model)
        for _ in range(3):
            prefill(contextlib.nullcontext), prefill(block)
        pairs = [(prefill(contextlib.nullcontext), prefill(block)) for _ in range(ROUNDS)]
        plain, pruned = (statistics.median(column) for column in zip(*pairs, strict=True))
        added = statistics.median(after - before for before, after in pairs)
        results[method] = {"plain_ms": plain, "pruned_ms": pruned, "overhead": 100 * added / plain}
    return results


def drive(
    pythons: dict[str, str], methods: list[str], processes: int, device: str
) -> dict[str, dict[str, dict[str, float]]]:
    """Engine -> method -> medians over processes."""
    runs: dict[str, list[dict[str, dict[str, float]]]] = {engine: [] for engine in pythons}
    for _ in range(processes):
        for engine, python in pythons.items():
            command = [python, __file__, "--worker", engine, "--methods", ",".join(methods), "--device", device]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"error: {engine} failed\n{done.stderr[-2000:]}")
            runs[engine].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        engine: {
            method: {key: statistics.median(run[method][key] for run in found) for key in found[0][method]}
            for method in methods
        }
        for engine, found in runs.items()
    }


def main() -> None:
    """Parse, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvpress", metavar="PYTHON", help="interpreter of an environment with kvpress 0.5.5")
    parser.add_argument("--processes", type=int, default=5, help="processes of each engine (default: 5)")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--worker", choices=["ours", "kvpress"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    methods = options.methods.split(",")
    if options.worker:
        print(json.dumps(measure(options.worker, methods, options.device)))
        return
    pythons = {"ours": sys.executable} | ({"kvpress": options.kvpress} if options.kvpress else {})
    results = drive(pythons, methods, options.processes, options.device)
    print("| method | prefill, ms | pruned, ms | overhead | goal | kvpress |\n|---|---|---|---|---|---|")
    for method in methods:
        row, rival = results["ours"][method], results.get("kvpress", {}).get(method)
        met = "met" if row["overhead"] <= METHODS[method] else "MISSED"
        goal = f"<= {METHODS[method]}%: {met}" if options.device == "cpu" else ""
        print(
            f"| {method} | {row['plain_ms']:.1f} | {row['pruned_ms']:.1f} | {row['overhead']:.1f}% | "
            f"{goal} | {'' if rival is None else format(rival['overhead'], '.1f') + '%'} |"
        )


if __name__ == "__main__":
    main()
