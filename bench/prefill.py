"""What pruning adds to a prefill: this project and kvpress, each in its own environment, in turns.

    python -m bench.prefill                                      # this project alone
    python -m bench.prefill --kvpress /path/to/its/bin/python    # beside kvpress (transformers below 5.3)
    python -m bench.prefill --device cuda                        # on a GPU, where no goal is set

A process runs one engine: prefills with and without pruning alternate, call by call, and the overhead is the median of
the differences between neighbours over the median prefill. The driver starts processes of both engines in turns and
takes the median over them. Workers run this file as a script, in an environment that may lack this project: it imports
neither engine, nor anything of `bench`, before it knows what it is.
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

TOKENS, ROUNDS, PROCESSES = 2048, 30, 3
METHODS = {
    "Knorm": 0.01,
    "SnapKV": 0.04,
    "ExpectedAttention": 0.03,
    "LagKV": 0.03,
    "CriticalKV(SnapKV)": 0.12,
    "Compactor": 0.20,
}
"""What is measured, and the goal of this project on a CPU: the overhead as a share of the prefill."""


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


def measure(
    engine: str, methods: list[str], device: str, *, tokens: int = TOKENS, rounds: int = ROUNDS
) -> dict[str, dict[str, float]]:
    """Milliseconds of a prefill without and with each method, and the overhead as a share of the former."""
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
    ids = torch.randint(0, 2048, (1, tokens)).to(device)
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
        pairs = [(prefill(contextlib.nullcontext), prefill(block)) for _ in range(rounds)]
        plain, pruned = (statistics.median(column) for column in zip(*pairs, strict=True))
        added = statistics.median(after - before for before, after in pairs)
        results[method] = {"plain_ms": plain, "pruned_ms": pruned, "overhead": added / plain}
    return results


def record(
    pythons: dict[str, str],
    *,
    methods: list[str] | None = None,
    processes: int = PROCESSES,
    device: str = "cpu",
    tokens: int = TOKENS,
    rounds: int = ROUNDS,
) -> dict[str, Any]:
    """What the processes of each engine found, and the goals with the medians over processes.

    Args:
        pythons: engine ("ours", "kvpress") to the interpreter of its environment.
        methods: names of `METHODS`; all by default.
        processes: of each engine, started in turns.
        device: "cpu" or "cuda".
        tokens: of a prefill.
        rounds: pairs of prefills, without and with pruning, of a process.

    Raises:
        RuntimeError: a worker failed; the message ends as its output does.
    """
    from bench.goal import Goal

    methods = methods or list(METHODS)
    runs: dict[str, list[dict[str, dict[str, float]]]] = {engine: [] for engine in pythons}
    for _ in range(processes):
        for engine, python in pythons.items():
            command = [python, __file__, "--worker", engine, "--methods", ",".join(methods), "--device", device]
            command += ["--tokens", str(tokens), "--rounds", str(rounds)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"the worker of {engine} failed\n{done.stderr[-2000:]}")
            runs[engine].append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for method in methods:
        row: dict[str, Any] = {"method": method, "runs": {e: [run[method] for run in runs[e]] for e in runs}}
        for engine in runs:
            row[engine] = {
                key: statistics.median(run[method][key] for run in runs[engine])
                for key in ("plain_ms", "pruned_ms", "overhead")
            }
        if device == "cpu":
            row["goal"] = Goal("overhead", METHODS[method]).judge(row["ours"]["overhead"])
        rows.append(row)
    return {"tokens": tokens, "rounds": rounds, "processes": processes, "device": device, "rows": rows}


def table(results: dict[str, Any]) -> str:
    """What `record` returned, in Markdown."""
    from bench.goal import sentence

    lines = ["| method | prefill, ms | pruned, ms | overhead | of each process | goal | kvpress |", "|---" * 7 + "|"]
    for row in results["rows"]:
        ours, rival = row["ours"], row.get("kvpress")
        goal = sentence(row["goal"]) if "goal" in row else ""
        each = ", ".join(f"{100 * run['overhead']:.1f}" for run in row["runs"]["ours"])
        lines.append(
            f"| {row['method']} | {ours['plain_ms']:.1f} | {ours['pruned_ms']:.1f} | {ours['overhead']:.1%} | {each} "
            f"| {goal} | {format(rival['overhead'], '.1%') if rival else ''} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvpress", metavar="PYTHON", help="interpreter of an environment with kvpress 0.5.5")
    parser.add_argument("--processes", type=int, default=PROCESSES, help="processes of each engine (default: 3)")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=["ours", "kvpress"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    methods = options.methods.split(",")
    if options.worker:
        found = measure(options.worker, methods, options.device, tokens=options.tokens, rounds=options.rounds)
        print(json.dumps(found))
        return
    pythons = {"ours": sys.executable} | ({"kvpress": options.kvpress} if options.kvpress else {})
    print(table(record(pythons, methods=methods, processes=options.processes, device=options.device)))


if __name__ == "__main__":
    main()
