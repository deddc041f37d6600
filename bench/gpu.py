"""Check and measure every op on this machine's GPU, and write down what came out. Called by `make gpu`.

    python -m bench.gpu [--only NAME] [--out FOLDER] [--smoke]

A variant's speed-up is printed only where the kernel gave the right answer on this machine in this run. `--smoke` goes
through everything on the CPU at small sizes, with the reference backend: it tests this program and measures nothing.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import measure
from bench.case import OURS, Setting
from bench.cases import cases
from bench.goal import sentence
from bench.run import line, machine, run, stem

# Shapes small enough to go through everything on a CPU in seconds.
SMOKE: dict[str, Any] = {
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "width": 64,
    "layers": 2,
    "tokens": 50,
    "lengths": (512, 1_024),
    "middle": 256,
    "long": 1_024,
}


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
    setting = Setting(device, **(SMOKE if arguments.smoke else {}))
    ceilings = measure.ceilings(device, setting.dtype)
    layer_us = None if arguments.smoke else layer_prefill_us(setting)
    results = []
    for case in cases(setting):
        if re.search(arguments.only, case.name):
            results.append(run(case, setting, ceilings, layer_us, 0.01 if arguments.smoke else arguments.seconds))
            print(line(results[-1]), flush=True)
    document = {
        "machine": machine(device) if not arguments.smoke else machine(device) | {"device": "smoke"},
        "ceilings": asdict(ceilings),
        "layer_prefill_us": layer_us,
        "cases": results,
    }
    write(document, arguments.out)
    return int(not all(result["correct"] for result in results))


def layer_prefill_us(s: Setting) -> float:
    """One Mistral layer over the shortest length, in bf16 with random weights, as transformers runs it."""
    from transformers import MistralConfig
    from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralRotaryEmbedding

    config = MistralConfig(sliding_window=None, attn_implementation="sdpa")
    with torch.device(s.device):
        layer = MistralDecoderLayer(config, 0).to(torch.bfloat16).eval()
        rotary = MistralRotaryEmbedding(config)
    hidden = torch.randn(1, s.lengths[0], config.hidden_size, device=s.device, dtype=torch.bfloat16)
    position_ids = torch.arange(s.lengths[0], device=s.device)[None]
    embeddings = rotary(hidden, position_ids)

    @torch.no_grad()
    def prefill() -> Any:
        return layer(hidden, position_ids=position_ids, position_embeddings=embeddings)

    return measure.interleaved({"layer": [prefill]}, s.device)["layer"].median_us


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
        speed_ups = ", ".join(f"{name} {ratio:.1f}x" for name, ratio in result["speed_ups"].items()) or "-"
        goals = "; ".join(map(sentence, result["goals"])) or "-"
        rows.append(
            f"| {result['name']} | {result['bytes'] / 1e6:.1f} | {result['flops'] / 1e9:.2f} "
            f"| {result['floor_us']:.1f} | {ours['median_us']:.1f} ({ours['low_us']:.1f} to {ours['high_us']:.1f}) "
            f"| {100 * result['floor_us'] / ours['median_us']:.0f}% | {result['bytes'] / ours['median_us'] / 1e3:.0f} "
            f"| {result['relative_error']:.1e} | {speed_ups if result['correct'] else 'wrong answer'} | {goals} |"
        )
    return "\n".join(rows) + "\n"


def write(document: dict[str, Any], folder: Path) -> None:
    """`<device>.json` and `<device>.md` in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    name = stem(document["machine"]["device"])
    (folder / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    (folder / f"{name}.md").write_text(table(document))
    print(f"\n{table(document)}\nwritten: {folder / name}.json and .md")


if __name__ == "__main__":
    sys.exit(main())
