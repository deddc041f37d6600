"""Check and measure every op on this machine's GPU, and write down what came out. Called by `make gpu`.

    python -m bench.gpu [--only NAME] [--out FOLDER] [--smoke]

A variant's speed-up is printed only where the kernel gave the right answer on this machine in this run. `--smoke` goes
through everything on the CPU at small sizes, with the reference backend: it tests this program and measures nothing.
"""

import argparse
import json
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

import condense_core
from bench import measure
from bench.cases import OURS, Case, Goal, Sizes
from bench.measure import Ceilings, Timing
from bench.suites import cases

SMOKE = Sizes(heads=4, kv_heads=2, head_dim=16, width=64, tokens=50, long=1_024, short=512, middle=256, layers=2)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; 1 if a kernel was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", default="", help="regular expression that a case's name must match")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the results")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each variant of a case")
    parser.add_argument("--smoke", action="store_true", help="small sizes on the CPU, to test this program")
    arguments = parser.parse_args(argv)
    if not arguments.smoke and not torch.cuda.is_available():
        parser.error("no CUDA device is available to torch: this measures GPU kernels")
    device = torch.device("cpu" if arguments.smoke else "cuda")
    sizes = SMOKE if arguments.smoke else Sizes()
    ceilings = measure.ceilings(device)
    layer_us = None if arguments.smoke else layer_prefill_us(sizes, device)
    results = []
    for case in cases(sizes, device):
        if re.search(arguments.only, case.name):
            results.append(run(case, device, ceilings, layer_us, 0.01 if arguments.smoke else arguments.seconds))
            print(line(results[-1]), flush=True)
    document = {
        "machine": machine(device),
        "ceilings": asdict(ceilings),
        "layer_prefill_us": layer_us,
        "cases": results,
    }
    write(document, arguments.out)
    return int(not all(result["correct"] for result in results))


def run(case: Case, device: torch.device, ceilings: Ceilings, layer_us: float | None, seconds: float) -> dict[str, Any]:
    """Check one case against the specification, then time its variants in turns."""
    inputs = [case.inputs(0)]
    size = sum(t.nbytes for t in inputs[0])
    inputs += [case.inputs(1_000 * i) for i in range(1, measure.copies(size, device))]
    ours = case.variants[OURS]
    expected = case.expected(*inputs[0])
    error = relative_error(case.result(ours(*inputs[0])), expected)
    correct = error <= case.tolerance
    calls = {name: [_bind(variant, tensors) for tensors in inputs] for name, variant in case.variants.items()}
    times = measure.interleaved(calls, device, seconds=seconds)
    floor_us = 1e6 * max(case.bytes / ceilings.copy_bytes_per_s, case.flops / ceilings.matmul_flop_per_s)
    result: dict[str, Any] = {
        "name": case.name,
        "shape": case.shape,
        "bytes": case.bytes,
        "flops": case.flops,
        "relative_error": error,
        "tolerance": case.tolerance,
        "correct": correct,
        "floor_us": floor_us,
        "times": {name: asdict(timing) for name, timing in times.items()},
        "temporaries": measure.temporaries(calls[OURS][0], device),
        "synchronises": measure.synchronises(calls[OURS][0], device),
        # What a kernel that is wrong would reach is of no interest.
        "speed_ups": {n: t.median_us / times[OURS].median_us for n, t in times.items() if n != OURS} if correct else {},
    }
    result["goals"] = [judge(goal, result, times[OURS], ceilings, layer_us) for goal in case.goals] if correct else []
    return result


def _bind(variant: Any, tensors: tuple[Tensor, ...]) -> Any:
    return lambda: variant(*tensors)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of the expected values; forced tokens (+inf) must agree exactly."""
    actual, expected = actual.double(), expected.double()
    finite = expected.isfinite()
    if actual.shape != expected.shape or not torch.equal(actual[~finite], expected[~finite]):
        return float("inf")
    difference = torch.linalg.vector_norm(actual[finite] - expected[finite])
    error = float(difference / torch.linalg.vector_norm(expected[finite]).clamp_min(1e-30))
    return error if error == error else float("inf")


def judge(
    goal: Goal, result: dict[str, Any], ours: Timing, ceilings: Ceilings, layer_us: float | None
) -> dict[str, Any]:
    """The goal with what was reached."""
    reached: float | None
    if goal.kind == "speed-up":
        rivals = [ratio for name, ratio in result["speed_ups"].items() if name.startswith(goal.over)]
        reached = min(rivals, default=None)
    elif goal.kind == "copy":
        reached = result["bytes"] / (ours.median_us * 1e-6) / ceilings.copy_bytes_per_s
    elif goal.kind == "us":
        reached = ours.median_us
    elif goal.kind == "temporaries":
        reached = result["temporaries"]
    else:
        reached = None if layer_us is None else ours.median_us / layer_us
    at_most = goal.kind in ("us", "temporaries", "layer")
    met = None if reached is None else (reached <= goal.value if at_most else reached >= goal.value)
    return {**asdict(goal), "reached": reached, "met": met}


def layer_prefill_us(sizes: Sizes, device: torch.device) -> float:
    """One Mistral layer over `sizes.short` tokens, in bf16 with random weights, as transformers runs it."""
    from transformers import MistralConfig
    from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralRotaryEmbedding

    config = MistralConfig(sliding_window=None, attn_implementation="sdpa")
    with torch.device(device):
        layer = MistralDecoderLayer(config, 0).to(torch.bfloat16).eval()
        rotary = MistralRotaryEmbedding(config)
    hidden = torch.randn(1, sizes.short, config.hidden_size, device=device, dtype=torch.bfloat16)
    position_ids = torch.arange(sizes.short, device=device)[None]
    embeddings = rotary(hidden, position_ids)

    @torch.no_grad()
    def prefill() -> Any:
        return layer(hidden, position_ids=position_ids, position_embeddings=embeddings)

    return measure.interleaved({"layer": [prefill]}, device)["layer"].median_us


def machine(device: torch.device) -> dict[str, Any]:
    """Date, device and versions."""
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "condense_core": condense_core.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    if device.type != "cuda":
        return {**facts, "device": "cpu"}
    properties = torch.cuda.get_device_properties(device)
    return {
        **facts,
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }


def line(result: dict[str, Any]) -> str:
    """A case in one line of the terminal."""
    ours = result["times"][OURS]
    if not result["correct"]:
        return f"{result['name']:42} WRONG: relative error {result['relative_error']:.2e} > {result['tolerance']:.0e}"
    share = f"{100 * result['floor_us'] / ours['median_us']:5.0f}% of the floor"
    rivals = ", ".join(f"{ratio:.1f}x {name}" for name, ratio in result["speed_ups"].items())
    return f"{result['name']:42}{ours['median_us']:10.1f} us {share}; {rivals}"


def table(document: dict[str, Any]) -> str:
    """The roofline table, in Markdown."""
    facts, ceilings = document["machine"], document["ceilings"]
    copy, product = ceilings["copy_bytes_per_s"] / 1e12, ceilings["matmul_flop_per_s"] / 1e12
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "triton", "condense_core"))
    columns = ["case", "MB", "GFLOP", "floor us", "us (10th to 90th percentile)", "floor / us", "GB/s", "rel. error"]
    columns += ["speed-up over", "goals"]
    rows = [
        f"# {facts['device']}\n\n{facts['date']}, {versions}.\n",
        f"A large copy moves {copy:.2f} TB/s, bytes read and written counted; a large bf16 product of random matrices",
        f"runs at {product:.0f} TFLOP/s. The floor of a case is the larger of its bytes over the one and its",
        "operations over the other. Medians of rounds in turns, inputs cold; a speed-up is a ratio of two of them.\n",
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
    ]
    for result in document["cases"]:
        ours = result["times"][OURS]
        speed_ups = ", ".join(f"{name} {ratio:.1f}x" for name, ratio in result["speed_ups"].items()) or "wrong answer"
        goals = "; ".join(_goal(goal) for goal in result["goals"]) or "-"
        rows.append(
            f"| {result['name']} | {result['bytes'] / 1e6:.1f} | {result['flops'] / 1e9:.2f} "
            f"| {result['floor_us']:.1f} | {ours['median_us']:.1f} ({ours['low_us']:.1f} to {ours['high_us']:.1f}) "
            f"| {100 * result['floor_us'] / ours['median_us']:.0f}% | {result['bytes'] / ours['median_us'] / 1e3:.0f} "
            f"| {result['relative_error']:.1e} | {speed_ups} | {goals} |"
        )
    return "\n".join(rows) + "\n"


def _goal(goal: dict[str, Any]) -> str:
    reached = "not measured" if goal["reached"] is None else f"{goal['reached']:.3g}"
    verdict = {True: "met", False: "MISSED", None: "open"}[goal["met"]]
    return f"{goal['kind']} {goal['over']} {goal['value']:.3g}: {reached}, {verdict}".replace("  ", " ")


def write(document: dict[str, Any], folder: Path) -> None:
    """`<device>.json` and `<device>.md` in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^a-z0-9]+", "-", document["machine"]["device"].lower()).strip("-")
    (folder / f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n")
    (folder / f"{stem}.md").write_text(table(document))
    print(f"\n{table(document)}\nwritten: {folder / stem}.json and .md")


if __name__ == "__main__":
    sys.exit(main())
