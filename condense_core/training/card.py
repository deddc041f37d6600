"""The embedded model's card, written from what was measured: ``python -m condense_core.training.card FOLDER``.

It reads ``results.json`` (``condense eval --json`` on held-out text), ``varied.json`` (the same with ``--wording
varied``) and ``curves.json`` beside the weights; no number in the card is typed by hand. The embedded model answers
with the bare value, so the card counts exact matches.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from string import Template
from typing import Any

from safetensors import safe_open

from condense_core.compressor.config import CompressorConfig

#: What the project asked of the embedded model: (method, ratio) -> share of the full context's exact matches.
TARGETS = {("pool", 4): 0.85, ("pool", 8): 0.70}

_TABLE_HEAD = (
    "| context | ratio | positions | exact match | of full | F1 | recovered | answer loss (nats/token) |",
    "|---|---|---|---|---|---|---|---|",
)


def write_card(folder: Path) -> None:
    """Fill ``card.md`` from the files in ``folder`` and write it as ``folder/README.md``."""
    results = json.loads((folder / "results.json").read_text())
    curves = json.loads((folder / "curves.json").read_text())
    other = json.loads((folder / "varied.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    compressor = CompressorConfig.load(folder / "condense" / "pool")
    rows = {(row["method"], row["ratio"]): row for row in results["rows"]}
    low, high = results["context_chars"]
    values = {
        "parameters": f"{_parameters(folder / 'model.safetensors') / 1e6:.1f}",
        "layers": config["num_hidden_layers"],
        "width": config["hidden_size"],
        "heads": config["num_attention_heads"],
        "groups": config["num_key_value_heads"],
        "positions": f"{config['max_position_embeddings']:,}",
        "vocabulary": f"{config['vocab_size']:,}",
        "low": f"{low:,}",
        "high": f"{high:,}",
        "facts": results["facts_per_context"],
        "versions": ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        "table": "\n".join([*_TABLE_HEAD, *(_row(row, _exact(rows["full", 0])) for row in results["rows"])]),
        "aims": "\n".join(_aims(rows)),
        "kinds": "\n".join(_kinds(rows)),
        "other": "\n".join(_other(other["rows"])),
        "other_questions": other["questions"],
        "other_date": other["date"],
        "lm_tokens": f"{_last(curves['lm'], 'tokens') / 1e6:.1f}",
        "cotrain_tokens": f"{_last(curves['cotrain'], 'tokens') / 1e6:.1f}",
        "steps": f"{_last(curves['pool'], 'step'):,.0f}",
        "text_loss": f"{_tail_mean(curves['cotrain'], 'text'):.1f}",
        "noise": f"{100 * math.sqrt(0.9 * 0.1 / results['questions']):.1f}",
        "encoder_layers": compressor.encoder_layers,
        "rank": compressor.lora_rank,
        "pool_heads": compressor.num_heads,
        "ratios": ", ".join(map(str, compressor.ratios)),
        **{key: results[key] for key in ("questions", "contexts", "corpus", "dtype", "device", "date")},
    }
    template = Template(Path(__file__).with_name("card.md").read_text())
    (folder / "README.md").write_text(template.substitute(values))


def _exact(row: dict[str, Any]) -> float:
    """The share of exact matches, which reports of version 0.1 call accuracy."""
    return float(row["exact_match"] if "exact_match" in row else row["accuracy"])


def _row(row: dict[str, Any], full: float) -> str:
    name = {"full": "full text", "none": "no context"}.get(row["method"], f"`{row['method']}`")
    ratio = f"{row['ratio']}x" if row["ratio"] else ""
    share = f"{_exact(row) / full:.0%}" if full else ""
    return (
        f"| {name} | {ratio} | {row['positions']:,.0f} | {_exact(row):.1%} | {share} | {row['f1']:.1%} | "
        f"{row['recovered']:.2f} | {row['loss']:.3f} |"
    )


def _aims(rows: dict[tuple[str, int], dict[str, Any]]) -> list[str]:
    """Each aim with what was reached."""
    full, none = _exact(rows["full", 0]), _exact(rows["none", 0])
    aims = [("full context at least 90%", full, full >= 0.9), ("no context at most 10%", none, none <= 0.1)]
    for (method, ratio), share in TARGETS.items():
        reached = _exact(rows[method, ratio]) / full
        aims.append((f"`{method}` at {ratio}x at least {share:.0%} of full", reached, reached >= share))
    ratios = sorted({ratio for _, ratio in rows if ratio})
    behind = [
        f"{ratio}x ({other} {_exact(rows[other, ratio]):.1%}, pool {_exact(rows['pool', ratio]):.1%})"
        for ratio in ratios
        for other in ("mean", "memory")
        if _exact(rows["pool", ratio]) < _exact(rows[other, ratio])
    ]
    text = [f"- {aim}: {value:.1%}, {'reached' if ok else '**not reached**'}" for aim, value, ok in aims]
    verdict = "reached" if not behind else f"**not reached** at {', '.join(behind)}"
    return [*text, f"- `pool` not below `mean` and `memory` at any ratio: {verdict}"]


def _kinds(rows: dict[tuple[str, int], dict[str, Any]]) -> list[str]:
    kinds = sorted(rows["full", 0]["by_kind"])
    shown = [("full text", ("full", 0)), *((f"`pool` {r}x", ("pool", r)) for m, r in rows if m == "pool")]
    table = [f"| context | {' | '.join(kinds)} |", f"|---{'|---' * len(kinds)}|"]
    for name, key in shown:
        accuracy = rows[key]["by_kind"]
        table.append(f"| {name} | {' | '.join(f'{accuracy[kind]:.0%}' for kind in kinds)} |")
    return table


def _other(rows: list[dict[str, Any]]) -> list[str]:
    """A table of answers that contain the value, since in other words than trained on it may say more than that."""
    table = ["| context | ratio | contained | 95% interval | recovered |", "|---|---|---|---|---|"]
    for row in rows:
        name = {"full": "full text", "none": "no context"}.get(row["method"], f"`{row['method']}`")
        low, high = row["intervals"]["contained"]
        ratio = f"{row['ratio']}x" if row["ratio"] else ""
        table.append(
            f"| {name} | {ratio} | {row['contained']:.1%} | {low:.0%} to {high:.0%} | {row['recovered']:.2f} |"
        )
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
