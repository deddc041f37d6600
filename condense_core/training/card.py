"""The embedded model's card, written from what was measured: ``python -m condense_core.training.card FOLDER``.

Reads ``results.json`` (``condense eval --json`` on held-out text) and ``curves.json`` beside the weights; no number in the
card is typed by hand.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from safetensors import safe_open

from condense_core.compressor.config import TRAINED_METHODS, CompressorConfig

#: What the project asked of the embedded model: (method, ratio) -> share of the full context's accuracy.
TARGETS = {("pool", 4): 0.85, ("pool", 8): 0.70}


def write_card(folder: Path) -> None:
    """Write ``folder/README.md``."""
    results = json.loads((folder / "results.json").read_text())
    curves = json.loads((folder / "curves.json").read_text())
    rows = {(row["method"], row["ratio"]): row for row in results["rows"]}
    config = json.loads((folder / "config.json").read_text())
    compressor = CompressorConfig.load(folder / "condense" / "pool")
    low, high = results["context_chars"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: condense-core",
        "---",
        "# condense-tiny",
        "",
        f"A Mistral-architecture language model of {_parameters(folder / 'model.safetensors') / 1e6:.1f} M parameters "
        f"({config['num_hidden_layers']} layers, width {config['hidden_size']}, {config['num_attention_heads']} query and "
        f"{config['num_key_value_heads']} KV heads, {config['max_position_embeddings']:,} positions, "
        f"{config['vocab_size']:,} tokens of about 3.75 characters) with three trained compressors in `condense/`. It is "
        "small enough to live in a repository and to answer on a laptop's CPU. **It finds facts in its context and repeats "
        "them; it knows nothing and cannot hold a conversation.** It exists so that every part of condense_core runs on "
        "something real.",
        "",
        "## What was measured",
        "",
        f"{results['questions']} questions about {results['contexts']} contexts of {low:,} to {high:,} characters of held-out "
        f"text (`{results['corpus']}`), {results['facts_per_context']} facts inserted into each; the entities and values asked "
        f"for never occur in training. Weights as shipped, {results['dtype']}, {results['device']}, {results['date']}; "
        f"{versions}. Exact match is SQuAD's; *recovered* is (loss without context - loss with soft tokens) / (loss without "
        "context - loss with full context) on the answer.",
        "",
        "| context | ratio | positions | exact match | of full | F1 | recovered | answer loss (nats/token) |",
        "|---|---|---|---|---|---|---|---|",
        *(_row(row, rows["full", 0]["accuracy"]) for row in results["rows"]),
        "",
        *_targets(rows),
        "",
        "Accuracy by kind of answer:",
        "",
        *_kinds(rows),
        "",
        "## How it was trained",
        "",
        "`make tiny CORPUS=train.jsonl.xz` is the whole recipe (`condense_core/training/tiny.py`):",
        "",
        "1. *A structured start.* Heads that look one and two tokens back, heads that average what was near, and heads that "
        "match it (`training/induction_init.py`). Answering from context, which an ordinary start had not begun to learn "
        "after 5 M tokens, is learned in less than 0.5 M.",
        f"2. *Language model*, {_last(curves['lm'], 'tokens') / 1e6:.1f} M tokens: running text, and conversations about a "
        "context of 96 to 256 tokens.",
        f"3. *With its compressors*, {_last(curves['cotrain'], 'tokens') / 1e6:.1f} M tokens, contexts growing from 64 to "
        "2,100 tokens. Three quarters of the batches give the context as soft tokens, in turns from `pool`, `mean` and "
        "`memory`, which learn at the same time. This is what a model of this size needs and a 7B model does not: without it "
        "the LM has no way to read a vector that stands for several tokens.",
        f"4. *Frozen.* The LM is rounded to bf16 and fixed; each compressor trains {_last(curves['pool'], 'step'):,} more "
        "steps for it: KL to the full-context answer plus cross-entropy, on questions, reconstruction and continuation. "
        "All three methods had the same number of steps, batches of the same size and the same schedule throughout.",
        "",
        f"`pool` and `mean` read the context with the LM's first {compressor.encoder_layers} layers (LoRA rank "
        f"{compressor.lora_rank}, merged at load); `pool` attends inside each window with {compressor.num_heads} heads, "
        "`mean` averages; `memory` appends slots to segments of 512 tokens and reads them back. The projection behind them "
        "is the same. One checkpoint of each serves the ratios "
        f"{', '.join(map(str, compressor.ratios))}.",
        "",
        "![training curves](curves.png)",
        "",
        "Text: English prose from PEPs, Rust RFCs and The Rust Book, EIPs, BIPs, PowerShell documentation, Sherlock Holmes "
        "and the King James Bible (permissive licences and public domain), 25.6 M characters, plus facts from "
        "`condense_core/tasks/facts.py`.",
        "",
        "## What it is not",
        "",
        f"- A language model worth sampling from: its loss on running text ended at {_tail_mean(curves['cotrain'], 'text'):.1f} "
        f"nats per token.",
        "- Evidence about Mistral-7B. It shows that the path works, and how the methods compare under one small budget.",
        "- A reader of questions in other words: it was trained on the question and statement templates of "
        "`tasks/facts.py`. Ask in that style (\"What is the access code of the amber abbey?\").",
        "- Private. Soft tokens are a lossy encoding, not encryption.",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines))


def _row(row: dict[str, Any], full: float) -> str:
    name = {"full": "full text", "none": "no context"}.get(row["method"], f"`{row['method']}`")
    ratio = f"{row['ratio']}x" if row["ratio"] else ""
    share = f"{row['accuracy'] / full:.0%}" if full else ""
    return (
        f"| {name} | {ratio} | {row['positions']:,.0f} | {row['accuracy']:.1%} | {share} | {row['f1']:.1%} | "
        f"{row['recovered']:.2f} | {row['loss']:.3f} |"
    )


def _targets(rows: dict[tuple[str, int], dict[str, Any]]) -> list[str]:
    """Each aim with what was reached."""
    full, none = rows["full", 0]["accuracy"], rows["none", 0]["accuracy"]
    aims = [("full context at least 90%", full, full >= 0.9), ("no context at most 10%", none, none <= 0.1)]
    for (method, ratio), share in TARGETS.items():
        reached = rows[method, ratio]["accuracy"] / full
        aims.append((f"`{method}` at {ratio}x at least {share:.0%} of full", reached, reached >= share))
    ratios = sorted({ratio for _, ratio in rows if ratio})
    behind = [
        f"{ratio}x ({other} {rows[other, ratio]['accuracy']:.1%}, pool {rows['pool', ratio]['accuracy']:.1%})"
        for ratio in ratios
        for other in ("mean", "memory")
        if rows["pool", ratio]["accuracy"] < rows[other, ratio]["accuracy"]
    ]
    text = [f"- {aim}: {value:.1%}, {'reached' if ok else '**not reached**'}" for aim, value, ok in aims]
    verdict = "reached" if not behind else f"**not reached** at {', '.join(behind)}"
    return ["Aims:", "", *text, f"- `pool` not below `mean` and `memory` at any ratio: {verdict}"]


def _kinds(rows: dict[tuple[str, int], dict[str, Any]]) -> list[str]:
    kinds = sorted(rows["full", 0]["by_kind"])
    shown = [("full text", ("full", 0)), *((f"`pool` {r}x", ("pool", r)) for m, r in rows if m == "pool")]
    table = [f"| context | {' | '.join(kinds)} |", f"|---{'|---' * len(kinds)}|"]
    for name, key in shown:
        accuracy = rows[key]["by_kind"]
        table.append(f"| {name} | {' | '.join(f'{accuracy[kind]:.0%}' for kind in kinds)} |")
    return table


def _last(rows: list[dict[str, Any]], key: str) -> float:
    return float([row[key] for row in rows if key in row][-1])


def _tail_mean(rows: list[dict[str, Any]], key: str, count: int = 5) -> float:
    values = [row[key] for row in rows if key in row][-count:]
    return sum(values) / len(values)


def _parameters(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)


if __name__ == "__main__":
    write_card(Path(sys.argv[1]))
