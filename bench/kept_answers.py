"""How often the answer stands in what ``select`` keeps: facts inserted into other text, and questions of a SQuAD file.

``python -m bench.kept_answers --model FOLDER --corpus FILE --squad FILE`` records it in
``bench/results/kept-answers.json``, of which ``python -m bench.tables`` makes the table of docs/select.md. A text is
read once for all of its questions and ratios and nothing is generated: it takes minutes where an evaluation of answers
takes hours.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from condense_core._version import __version__
from condense_core.compressor.condenser import Condenser
from condense_core.compressor.config import num_kept
from condense_core.compressor.selection import keep_sentences
from condense_core.compressor.tokenized import kept_text, make_passage
from condense_core.tasks.generators import Task, TaskConfig, make_tasks
from condense_core.tasks.sources import open_source
from condense_core.tasks.squad import read_squad, squad_tasks

RECORD = Path(__file__).parent / "results" / "kept-answers.json"
RATIOS = (2, 4, 8, 16)
WHAT = {"facts": "facts inserted into other text", "squad": "XQuAD"}


def kept(condenser: Condenser, task: Task, with_question: bool) -> Iterator[tuple[int, bool]]:
    """(ratio, whether the answer is in what is kept) for each question of ``task``."""
    questions = [turn.question if with_question else None for turn in task.turns]
    made = [make_passage(condenser.tokenizer, task.context, question, None) for question in questions]
    found = condenser.compressor.selector.scores([passage for passage, _ in made])
    for turn, (passage, offsets), scores in zip(task.turns, made, found, strict=True):
        for ratio in RATIOS:
            budget = num_kept(len(passage.ids), ratio)
            indices = keep_sentences(scores, torch.tensor(passage.sentences), budget).tolist()
            yield ratio, turn.answer in kept_text(task.context, offsets, indices)


def record(model: str, corpus: str | None, squad: str, contexts: int, dtype: torch.dtype) -> dict[str, Any]:
    """Run it; the flags of every question, by task, question known or not, and ratio."""
    condenser = Condenser.from_pretrained(model, method="select", device="cpu", dtype=dtype)
    config = TaskConfig(num_facts=10, num_questions=10, wording="varied")
    streams = {
        "facts": make_tasks("question", open_source(corpus), contexts, seed=0, config=config),
        "squad": squad_tasks(read_squad(squad), contexts, seed=0),
    }
    flags: dict[str, dict[str, list[int]]] = {}
    for name, tasks in streams.items():
        for task in tasks:
            for known in (True, False):
                rows = flags.setdefault(f"{name}, question {'known' if known else 'unknown'}", defaultdict(list))
                for ratio, is_kept in kept(condenser, task, known):
                    rows[str(ratio)].append(int(is_kept))
    return {
        "version": __version__,
        "model": condenser.model_id,
        "dtype": str(dtype),
        "contexts": contexts,
        "kept": flags,
    }


def table(recorded: dict[str, Any]) -> str:
    """The table of docs/select.md."""
    precision = recorded["dtype"].removeprefix("torch.")
    contexts = f"{recorded['contexts']} contexts of 6,000 to 7,000 characters each"
    lines = [
        f"{recorded['model']}, {precision}, {contexts}; `bench/results/{RECORD.name}`.",
        "",
        f"| | questions | {' | '.join(f'{ratio}x' for ratio in RATIOS)} |",
        "|---" * (2 + len(RATIOS)) + "|",
    ]
    for name, rows in recorded["kept"].items():
        task, _, question = name.partition(", ")
        shares = (sum(rows[str(ratio)]) / len(rows[str(ratio)]) for ratio in RATIOS)
        cells = " | ".join(f"{share:.0%}" for share in shares)
        lines.append(f"| {WHAT[task]}, {question} | {len(rows[str(RATIOS[0])])} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Run it as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m bench.kept_answers", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", required=True, help="a model folder or hub id")
    parser.add_argument("--corpus", required=True, help="text to insert facts into, as condense eval takes it")
    parser.add_argument("--squad", required=True, help="a file in SQuAD's format")
    parser.add_argument("--contexts", type=int, default=10, help="of each kind, with ten questions")
    parser.add_argument("--bf16", action="store_true", help="in bfloat16, not float32")
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    found = record(args.model, args.corpus, args.squad, args.contexts, dtype)
    RECORD.write_text(json.dumps(found) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
