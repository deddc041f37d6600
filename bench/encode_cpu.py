"""What reading costs on a CPU, beside transformers' padded batch: `python -m bench.encode_cpu [--out FOLDER]`.

Each case is one of `condense bench encode`, with random weights of a configuration, and is judged:

- one: a context of 7,000 characters; its time, its share of the machine's peak, its memory, and the plain forward pass
  of the same layers in turns with it.
- mixed: 16 contexts of 500 to 7,000 characters in one pack, in turns with the padded batch of the same layers.

It writes `encode-<processor>.json`; `python -m bench.tables` makes a table of it. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.goal import Goal, judged, sentence
from bench.run import machine, stem
from condense_core.decoder.embedded import embedded_model_path
from condense_core.profiling.configs import model_config
from condense_core.profiling.encode import EncodeBenchmark, EncodeSettings

Record = dict[str, Any]
PADDED = "the padded batch of the same layers"
PLAIN = "their plain forward pass, two turns being alike to 3%"
CHARS_PER_TOKEN = {"smollm2-135m": 4.66, "condense-tiny": 3.9}
"""Of English prose, counted with their tokenizers."""
MEMORY = Goal("activations", 1.3)


@dataclass(frozen=True)
class Case:
    """A model, how many of its layers read, and whether 16 mixed contexts are read or one."""

    model: str
    layers: int
    mixed: bool
    goals: tuple[Goal, ...]

    def settings(self, rounds: int) -> EncodeSettings:
        return EncodeSettings(
            layers=(self.layers,),
            batches=(1,),
            chars=7000,
            chars_per_token=CHARS_PER_TOKEN[self.model],
            mixed=self.mixed,
            baseline=True,
            rounds=rounds,
        )


CASES = (
    Case("smollm2-135m", 8, False, (Goal("speed-up", 0.97, PLAIN), MEMORY)),
    Case("smollm2-135m", 8, True, (Goal("speed-up", 1.6, PADDED), MEMORY)),
    Case("condense-tiny", 2, False, (Goal("speed-up", 0.97, PLAIN), MEMORY)),
    Case("condense-tiny", 2, True, (Goal("speed-up", 1.6, PADDED), MEMORY)),
)


def measure(case: Case, rounds: int) -> Record:
    """One case: what `condense bench encode` gives of it, and its goals."""
    source = embedded_model_path() if case.model == "condense-tiny" else case.model
    benchmark = EncodeBenchmark(
        model_config(source), case.settings(rounds), name=case.model, device=torch.device("cpu"), dtype=torch.float32
    )
    [row] = benchmark.rows()
    if "refused" in row:
        return {"model": case.model, **row}
    faster = row["baseline"]["padded_over_packed"]
    memory = None if row["peak_bytes"] is None else row["peak_bytes"] / row["layer_activation_bytes"]
    goals = judged(case.goals, {PADDED: faster, PLAIN: faster}, {"activations": memory})
    return {"model": case.model, "mixed": case.mixed, "goals": goals, **row}


def table(results: Path) -> str:
    """The records of all processors, one after another; a sentence where there is none."""
    parts = []
    for path in sorted(results.glob("encode-*.json")):
        record = json.loads(path.read_text())
        facts = record["machine"]
        where = f"{facts['device']}, {facts['threads']} threads, fp32"
        lines = [
            f"{where}; {facts['date'][:10]}; torch {facts['torch']}; `bench/results/{path.name}`.\n",
            "| contexts | layers | tokens | ms | of the machine's peak | transformers, ms | goals |",
            "|---" * 7 + "|",
        ]
        for row in record["rows"]:
            if "refused" in row:
                continue
            milliseconds, theirs = row["seconds"]["total"]["median"] * 1e3, row["baseline"]["seconds"]["median"] * 1e3
            what = f"{row['batch']} mixed" if row["mixed"] else "one of 7,000 characters"
            lines.append(
                f"| {row['model']}, {what} | {row['layers']} | {row['tokens']:,} | {milliseconds:,.0f} | "
                f"{row['share_of_floor']:.0%} | {theirs:,.0f} | {'; '.join(map(sentence, row['goals']))} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or "No record is here yet: `python -m bench.encode_cpu` makes one."


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; 1 if a goal was missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.encode_cpu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--models", help="comma-separated, of those that are measured (default: all)")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each case (default: 9)")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the record")
    options = parser.parse_args(argv)
    known = sorted({case.model for case in CASES})
    chosen = options.models.split(",") if options.models else known
    if unknown := sorted(set(chosen) - set(known)):
        parser.error(f"--models: {', '.join(unknown)}, expected some of {', '.join(known)}")
    options.out.mkdir(parents=True, exist_ok=True)
    facts = machine(torch.device("cpu"))
    rows = []
    for case in (case for case in CASES if case.model in chosen):
        rows.append(measure(case, options.rounds))
        print(f"{case.model}, {'mixed' if case.mixed else 'one'}: ", end="")
        print(rows[-1].get("refused") or "; ".join(map(sentence, rows[-1]["goals"])), flush=True)
    record = {"machine": facts, "rows": rows}
    (options.out / f"encode-{stem(facts['device'])}.json").write_text(json.dumps(record, indent=1) + "\n")
    return int(not all(goal["met"] for row in rows for goal in row.get("goals", [{"met": False}])))


if __name__ == "__main__":
    sys.exit(main())
