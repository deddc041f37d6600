"""What pruning adds to a prefill: this project and kvpress, each in its own environment, in turns.

    python -m bench.prefill                                      # this project alone
    python -m bench.prefill --kvpress /path/to/its/bin/python    # beside kvpress (transformers below 5.3)
    python -m bench.prefill --device cuda                        # on a GPU, where no goal is set
    python -m bench.prefill --model FOLDER --dtype bfloat16      # of a model instead of random weights, without a goal

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


OF_A_MODEL = ("SnapKV", "ExpectedAttention", "KeyDiff", "AdaKV(SnapKV)", "CriticalKV(SnapKV)", "Compactor", "KVzip")
"""What is measured of a model by default; KVzip is as published, with all heads competing for one budget."""

Prefill = Callable[[Any], Any]
"""Reads token ids ``[1, N]``."""


def read(model: Any, block: Callable[[], Any]) -> Prefill:
    """An ordinary prefill inside ``block()``."""
    from transformers import DynamicCache

    def run(ids: Any) -> None:
        with block():
            model(ids, past_key_values=DynamicCache(), logits_to_keep=1)

    return run


def ours(method: str, model: Any) -> Prefill:
    """A prefill that keeps half, in a new session."""
    from condense_core import pruning

    wrapper, _, inner = method.rstrip(")").rpartition("(")
    chosen = getattr(pruning, inner)(keep=0.5)
    if wrapper:
        chosen = getattr(pruning, wrapper)(chosen)
    if method == "KVzip":
        chosen = pruning.AcrossLayers(chosen)
        return lambda ids: pruning.PrunedCache.prefill(model, ids, chosen)
    return read(model, lambda: pruning.prune(model, chosen))


def kvpress(method: str, model: Any) -> Prefill:
    """The same as its users write it."""
    import kvpress

    wrapper, _, inner = method.rstrip(")").rpartition("(")
    press = getattr(kvpress, f"{inner}Press")(compression_ratio=0.5)
    if wrapper:
        press = getattr(kvpress, f"{wrapper}Press")(press)
    return read(model, lambda: press(model))


def subject(folder: str | None, dtype: str) -> Any:
    """The model in ``folder``, or one of random weights that is small enough to be prefilled often."""
    import torch
    from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
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
    return MistralForCausalLM(config).eval()


def measure(
    engine: str,
    methods: list[str],
    device: str,
    *,
    tokens: int = TOKENS,
    rounds: int = ROUNDS,
    model_folder: str | None = None,
    dtype: str = "float32",
) -> dict[str, dict[str, float]]:
    """Milliseconds of a prefill without and with each method, and the overhead as a share of the former."""
    import torch

    torch.manual_seed(0)
    model = subject(model_folder, dtype).to(device)
    ids = torch.randint(0, 2048, (1, tokens)).to(device)
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    plain_prefill = read(model, contextlib.nullcontext)

    def timed(prefill: Prefill) -> float:
        wait()
        start = time.perf_counter()
        with torch.no_grad():
            prefill(ids)
        wait()
        return (time.perf_counter() - start) * 1e3

    results = {}
    for method in methods:
        pruning_prefill = {"ours": ours, "kvpress": kvpress}[engine](method, model)
        for _ in range(min(3, rounds)):
            timed(plain_prefill), timed(pruning_prefill)
        pairs = [(timed(plain_prefill), timed(pruning_prefill)) for _ in range(rounds)]
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
    model: str | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """What the processes of each engine found, and the goals with the medians over processes.

    Args:
        pythons: engine ("ours", "kvpress") to the interpreter of its environment.
        methods: names of `METHODS`, or of `OF_A_MODEL`; all by default.
        processes: of each engine, started in turns.
        device: "cpu" or "cuda".
        tokens: of a prefill.
        rounds: pairs of prefills, without and with pruning, of a process.
        model: folder of the model that is prefilled; None: a small one of random weights, which goals are set for.
        dtype: of that folder's model.

    Raises:
        RuntimeError: a worker failed; the message ends as its output does.
    """
    from bench.goal import Goal

    methods = methods or list(OF_A_MODEL if model else METHODS)
    runs: dict[str, list[dict[str, dict[str, float]]]] = {engine: [] for engine in pythons}
    for _ in range(processes):
        for engine, python in pythons.items():
            command = [python, __file__, "--worker", engine, "--methods", ",".join(methods), "--device", device]
            command += ["--tokens", str(tokens), "--rounds", str(rounds)]
            command += ["--model", model, "--dtype", dtype] if model else []
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
        if device == "cpu" and not model:
            row["goal"] = Goal("overhead", METHODS[method]).judge(row["ours"]["overhead"])
        rows.append(row)
    setting = {"tokens": tokens, "rounds": rounds, "processes": processes, "device": device}
    return setting | ({"dtype": dtype} if model else {}) | {"rows": rows}


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


def model_table(results: dict[str, Any]) -> str:
    """What `record` returned of a model, in Markdown: both engines' own prefills, and what pruning adds to them."""
    what = f"{results.get('model', 'a model')}, {results['tokens']:,} tokens, {results['dtype']}, half of them kept"
    lines = [f"{what}; medians of {results['processes']} processes of each engine, in turns.", ""]
    lines += [
        "| method | prefill, ms | pruned, ms | overhead | kvpress: prefill | pruned | overhead |",
        "|---" * 7 + "|",
    ]
    for row in results["rows"]:
        cells = []
        for engine in ("ours", "kvpress"):
            found = row.get(engine)
            numbers = (found["plain_ms"], found["pruned_ms"]) if found else ()
            cells += [*(f"{ms:,.0f}" for ms in numbers), f"{found['overhead']:.0%}"] if found else [""] * 3
        lines.append(f"| {row['method']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Parse, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvpress", metavar="PYTHON", help="interpreter of an environment with kvpress 0.5.5")
    parser.add_argument("--processes", type=int, default=PROCESSES, help="processes of each engine (default: 3)")
    parser.add_argument("--methods", help="comma-separated (default: all)")
    parser.add_argument("--model", help="folder of the model to prefill (default: random weights of a small one)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of that model")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"of a prefill (default: {TOKENS})")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of a process (default: {ROUNDS})")
    parser.add_argument("--worker", choices=["ours", "kvpress"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    methods = options.methods.split(",") if options.methods else list(OF_A_MODEL if options.model else METHODS)
    shape = {"tokens": options.tokens, "rounds": options.rounds}
    if options.worker:
        found = measure(
            options.worker, methods, options.device, model_folder=options.model, dtype=options.dtype, **shape
        )
        print(json.dumps(found))
        return
    pythons = {"ours": sys.executable} | ({"kvpress": options.kvpress} if options.kvpress else {})
    found = record(
        pythons,
        methods=methods,
        processes=options.processes,
        device=options.device,
        model=options.model,
        dtype=options.dtype,
        **shape,
    )
    print(model_table(found) if options.model else table(found))


if __name__ == "__main__":
    main()
