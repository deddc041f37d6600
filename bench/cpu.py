"""Measure on this machine's CPU everything that the pages of docs/ print of one: `make bench-cpu`.

    python -m bench.cpu [--only ops,layers,decode,prefill,memory] [--kvpress PYTHON] [--out FOLDER] [--smoke]
    python -m bench.cpu --only prefill_model --model FOLDER [--kvpress PYTHON]

There are six parts, which can be run one by one: ops at Mistral-7B's shapes beside their rivals; a layer pruned by
each method beside kvpress; a decode step's attention; what pruning adds to a prefill, of a small model and of --model;
the memory of a prefill. Each writes what it found, with machine, date and versions, into `cpu-<processor>.json`; parts
that were not asked for stay there as they are. Run it on a quiet machine: within a part everything takes turns, which
does not help against other programs that come and go.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import decode, layer, measure, memory, prefill
from bench.case import Setting
from bench.cases import cases
from bench.gpu import SMOKE
from bench.run import line, machine, run, stem
from condense_core.ops import native
from condense_core.profiling.processor import processor

DTYPES = (torch.float32, torch.bfloat16)
CPU = torch.device("cpu")
# One text instead of a pack, one layer instead of 32, and no long caches to score, where a rival takes a second. Only
# the baseline of attention_pool is compiled: compiling all takes minutes, and eager ones are what kvpress runs.
SHAPES: dict[str, Any] = {"packs": (1,), "lengths": (2_048,), "layers": 1, "middle": 16_384, "compiled": False}


def ops_part(options: argparse.Namespace) -> dict[str, Any]:
    """Every op, checked and timed in fp32 and bf16."""
    results, ceilings = [], {}
    for dtype in DTYPES:
        changes = {**SMOKE, "packs": (1,), "lengths": (512,), "compiled": False} if options.smoke else SHAPES
        setting = Setting(CPU, dtype, **changes)
        found = measure.ceilings(CPU, dtype)
        ceilings[str(dtype).removeprefix("torch.")] = asdict(found)
        for case in cases(setting):
            results.append(run(case, setting, found, None, 0.01 if options.smoke else 0.7))
            print(line(results[-1]), flush=True)
            gc.collect()
    return {"ceilings": ceilings, "rows": results}


def layers_part(options: argparse.Namespace) -> dict[str, Any]:
    """A layer scored, selected and compacted to half by each method, beside kvpress."""
    small: dict[str, Any] = {"heads": 8, "kv_heads": 2, "width": 256} if options.smoke else {}
    rows = []
    for dtype in DTYPES:
        tensors = layer.mistral(1024 if options.smoke else 2048, dtype, **small)
        for method in layer.METHODS:
            rows.append(layer.record(method, tensors, seconds=0.01 if options.smoke else 1.0))
            print(line(rows[-1] | {"relative_error": 1 - rows[-1]["common"], "tolerance": 0.0}), flush=True)
    return {"rows": rows}


def decode_part(options: argparse.Namespace) -> dict[str, Any]:
    """A decode step's attention over pruned and full caches."""
    size: dict[str, Any] = {"tokens": 512, "seconds": 0.01} if options.smoke else {}
    rows = [decode.record(layout, dtype, **size) for dtype in DTYPES for layout in decode.LAYOUTS]
    print("\n".join(map(line, rows)), flush=True)
    return {"rows": rows}


def prefill_part(options: argparse.Namespace) -> dict[str, Any]:
    """What pruning adds to a prefill."""
    pythons = {"ours": sys.executable} | ({"kvpress": options.kvpress} if options.kvpress else {})
    size: dict[str, Any] = {"processes": 1, "tokens": 512, "rounds": 2} if options.smoke else {}
    found = prefill.record(pythons, **size)
    print(prefill.table(found), flush=True)
    return found


def prefill_model_part(options: argparse.Namespace) -> dict[str, Any]:
    """What pruning adds to a prefill of the model in a folder, in bfloat16; ten minutes for SmolLM2 beside kvpress."""
    pythons = {"ours": sys.executable} | ({"kvpress": options.kvpress} if options.kvpress else {})
    size: dict[str, Any] = (
        {"processes": 1, "tokens": 64, "rounds": 1} if options.smoke else {"processes": 2, "rounds": 2}
    )
    found = prefill.record(pythons, model=options.model, dtype="bfloat16", **({"tokens": 1536} | size))
    print(prefill.model_table(found), flush=True)
    return {"model": Path(options.model).name, **found}


def memory_part(options: argparse.Namespace) -> dict[str, Any]:
    """Memory over the time of a prefill."""
    found = memory.record(**({"tokens": 512} if options.smoke else {}))
    print(memory.table(found), flush=True)
    return found


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "ops": ops_part,
    "layers": layers_part,
    "decode": decode_part,
    "prefill": prefill_part,
    "prefill_model": prefill_model_part,
    "memory": memory_part,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; 1 if an op was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", help="comma-separated parts (default: all, prefill_model with --model)")
    parser.add_argument("--model", metavar="FOLDER", help="of the model that prefill_model reads text with")
    parser.add_argument("--kvpress", metavar="PYTHON", help="interpreter of an environment with kvpress, for prefill")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="small sizes, to test this program")
    options = parser.parse_args(argv)
    by_default = [name for name in PARTS if options.model or name != "prefill_model"]
    chosen = options.only.split(",") if options.only else by_default
    if unknown := sorted(set(chosen) - set(PARTS)):
        parser.error(f"--only: {', '.join(unknown)}, expected some of {', '.join(PARTS)}")
    if "prefill_model" in chosen and not options.model:
        parser.error("--model: missing, expected the folder of a model for prefill_model")
    if native.missing() is not None:
        parser.error(f"the compiled CPU kernels are missing ({native.missing()}): run make ext")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"cpu-{stem(processor())}.json"
    document: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in chosen:
        print(f"== {name}", flush=True)
        started = time.perf_counter()
        found = PARTS[name](options)
        seconds = round(time.perf_counter() - started, 1)
        document[name] = {"machine": machine(CPU), "seconds": seconds, **found}
        path.write_text(json.dumps(document, indent=1) + "\n")
        print(f"{seconds:.0f} s", flush=True)
    print(f"written: {path}")
    rows = [row for name in ("ops", "layers") if name in chosen for row in document[name]["rows"]]
    return int(not all(row["correct"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
