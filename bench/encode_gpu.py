"""The encoder on this machine's GPU, eager beside compiled: `python -m bench.encode_gpu [--out FOLDER] [--smoke]`.

Layers of Mistral-7B with random weights in bf16 compress 7,000 characters, 1,750 tokens by assumption: one context, and
a pack of 16 of mixed lengths. Each way runs in every setting, all measured by `condense bench encode`'s own code. The
goals are those of an H200 and are judged on one alone. `--smoke` goes through everything on the CPU with a tiny model:
it tests this program and measures nothing.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.goal import Goal, sentence
from bench.run import machine, stem
from condense_core.compressor.compiled import MODES
from condense_core.profiling.configs import model_config
from condense_core.profiling.encode import EncodeBenchmark, EncodeSettings

WAYS = (None, *MODES)
JUDGED_ON = "H200"
GOALS = {
    (8, False): Goal("ms", 14.0, "of a context"),
    (32, False): Goal("ms", 45.0, "of a context"),
    (32, True): Goal("floor", 0.65),
}
"""By layers, and whether it is the pack of 16; reached is the best way."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m bench.encode_gpu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the results")
    parser.add_argument("--rounds", type=int, default=10, help="measurements of each row")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU, to test this program")
    arguments = parser.parse_args(argv)
    if not arguments.smoke and not torch.cuda.is_available():
        parser.error("no CUDA device is available to torch: this measures the encoder on a GPU")
    device = torch.device("cpu" if arguments.smoke else "cuda")
    facts = machine(device) | ({"device": "smoke"} if arguments.smoke else {})
    rows = []
    for row in measured(device, arguments.rounds, smoke=arguments.smoke):
        rows.append(row)
        print(line(row), flush=True)
    document: dict[str, Any] = {"machine": facts, "rows": rows, "goals": verdicts(rows, facts["device"])}
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"encoder-{stem(facts['device'])}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    for verdict in document["goals"]:
        print(f"{verdict['layers']} layers, {'16 mixed' if verdict['mixed'] else 'one context'}: {sentence(verdict)}")
    print(f"written: {path}")
    return 0


def measured(device: torch.device, rounds: int, *, smoke: bool) -> Iterator[dict[str, Any]]:
    """A row for each depth, batch and way; `error` where a way failed, and the others go on."""
    config, depths = model_config("mistral-7b"), (8, 32)
    settings = EncodeSettings(layers=depths, rounds=rounds)
    dtype = torch.bfloat16
    if smoke:
        config, dtype = _tiny(config), torch.float32
        depths, settings = (1, 2), replace(settings, layers=(1, 2), chars=200, rounds=1)
    for depth in depths:
        for mixed in (False, True):
            for way in WAYS:
                own = replace(settings, layers=(depth,), mixed=mixed, compile_encoder=way)
                name = {"compile_encoder": way or "eager", "mixed": mixed}
                torch.compiler.reset()
                try:
                    benchmark = EncodeBenchmark(config, own, name="mistral-7b", device=device, dtype=dtype)
                    for row in benchmark.rows():
                        yield name | row
                except Exception as error:  # a compiler's, of any kind: it is what is to be found out
                    yield name | {"layers": depth, "error": f"{type(error).__name__}: {error}"[:500]}


def _tiny(config: Any) -> Any:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    return type(config)(**config.to_dict() | sizes | {"num_attention_heads": 4, "num_key_value_heads": 2})


def line(row: dict[str, Any]) -> str:
    """A row in words."""
    head = f"{row['layers']:>2} layers, {'16 mixed' if row['mixed'] else 'one    '}, {row['compile_encoder']:<27}"
    if (why := row.get("error") or row.get("refused")) is not None:
        return f"{head} not measured: {why}"
    return f"{head} {row['seconds']['total']['median'] * 1e3:8.2f} ms, {row['share_of_floor']:.0%} of the floor"


def verdicts(rows: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """The goals with what the best way reached; on another GPU than an H200 nothing counts as measured."""
    found = []
    for (layers, mixed), goal in GOALS.items():
        own = [r for r in rows if (r["layers"], r["mixed"]) == (layers, mixed) and "seconds" in r]
        best = min(own, key=lambda row: row["seconds"]["total"]["median"], default=None)
        reached = None
        if best is not None and JUDGED_ON in device:
            reached = best["share_of_floor"] if goal.kind == "floor" else best["seconds"]["total"]["median"] * 1e3
        way = None if reached is None or best is None else best["compile_encoder"]
        found.append({"layers": layers, "mixed": mixed, "way": way, **goal.judge(reached)})
    return found


if __name__ == "__main__":
    sys.exit(main())
