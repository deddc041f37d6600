"""How well an LLM answers from pruned caches: `python -m bench.pruning_quality OUT --model FOLDER ...`.

The questions are those of `condense eval --pruning` with `--wording varied` ("facts") or `--squad` ("squad"). A
context is read once for all rows. OUT, a JSON file, grows with every context, and a run that was stopped goes on:

    python -m bench.pruning_quality bench/results/quality-facts.json --model smollm2-135m --corpus valid.jsonl.xz
    python -m bench.pruning_quality bench/results/quality-squad.json --model smollm2-135m --squad xquad.en.json

`--prompts FILE` writes the token ids of contexts, questions and answers and ends, for `bench/kvpress_quality.py`, which
answers them through kvpress in an environment of its own and writes a file of the same form.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from condense_core._version import __version__
from condense_core.compressor.condenser import Condenser
from condense_core.files.atomic import write_atomically
from condense_core.pruning.build import without_path
from condense_core.pruning.text import prompt_of, question_ids
from condense_core.tasks.answers import answer_ids
from condense_core.tasks.generators import Task, TaskConfig, make_tasks
from condense_core.tasks.metrics import contained, token_f1
from condense_core.tasks.pruning import CacheTally, PrunedContext, row_method
from condense_core.tasks.sources import open_source
from condense_core.tasks.squad import SquadConfig, read_squad, squad_tasks

METHODS = (
    *("random", "query_aware"),
    *("across_layers(kvzip)", "sentences(surprise)", "sentences(query_aware(peak_attention))", "kvzip", "snapkv"),
    *("expected_attention", "keydiff", "compactor", "observed_attention", "streaming_llm", "tova", "knorm", "lagkv"),
    *("finch", "leverage", "non_causal", "adakv(snapkv)", "adakv(expected_attention)", "chunkkv(snapkv)"),
    *("criticalkv(snapkv)", "pyramidkv(snapkv)", "across_layers(snapkv)", "surprise", "peak_attention"),
)
SHARES = (0.5, 0.25, 0.125)


def tasks_of(options: argparse.Namespace) -> list[Task]:
    """The contexts and their questions."""
    if options.squad:
        squad = SquadConfig(min_chars=6000, max_chars=7000, num_questions=options.questions)
        return list(squad_tasks(read_squad(options.squad), options.contexts, seed=0, config=squad))
    config = TaskConfig(min_chars=6000, max_chars=7000, num_facts=10, num_questions=options.questions, wording="varied")
    return list(make_tasks("question", open_source(options.corpus), options.contexts, seed=0, config=config))


def prompts(condenser: Condenser, tasks: Iterable[Task]) -> list[dict[str, Any]]:
    """What another library needs to be asked the same: token ids, and the answers that count."""
    model, tokenizer = condenser.model, condenser.tokenizer
    return [
        {
            "context": list(prompt_of(model, tokenizer, task.context).input_ids),
            "questions": [question_ids(tokenizer, turn.question) for turn in task.turns],
            "answers": [answer_ids(tokenizer, turn.question, turn.answer) for turn in task.turns],
            "expected": [list(turn.accepted) for turn in task.turns],
        }
        for task in tasks
    ]


def score(path: Path, asked: Sequence[dict[str, Any]]) -> None:
    """Count the answers of a record that holds texts; what was counted before loses them and stays as it is."""
    record = json.loads(path.read_text())
    for cells, prompt in zip(record["contexts"], asked, strict=False):
        for cell in filter(None, cells.values()):
            if "texts" not in cell:
                continue
            pairs = list(zip(cell.pop("texts"), prompt["expected"], strict=True))
            cell["contained"] = [max(contained(text, right) for right in accepted) for text, accepted in pairs]
            cell["f1"] = [round(max(token_f1(text, right) for right in accepted), 4) for text, accepted in pairs]
    write_atomically(path, (json.dumps(record) + "\n").encode(), "the record")


def measured(context: PrunedContext, name: str, share: float) -> dict[str, Any] | None:
    """What every question about a context gave in one row; None where the method cannot prune to that share."""
    tally = CacheTally()
    try:
        context.measure(tally, name, partial(row_method, name, share))
    except ValueError as error:
        print(f"{name} at {share:g}: {error}")
        return None
    return {
        "contained": tally.contained,
        "f1": [round(value, 4) for value in tally.f1],
        "loss": [round(value, 5) for value in tally.losses],
        "bytes": round(sum(tally.cache_bytes) / max(len(tally.cache_bytes), 1)),
        "full_bytes": round(sum(tally.full_bytes) / max(len(tally.full_bytes), 1)),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what OUT lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--corpus")
    parser.add_argument("--squad")
    parser.add_argument("--contexts", type=int, default=30)
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    parser.add_argument("--shares", type=lambda text: [float(s) for s in text.split(",")], default=list(SHARES))
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--chunk-size", type=int)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--score", type=Path, help="count the answers of OUT, which kvpress gave to these prompts")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.score:
        score(options.out, json.loads(options.score.read_text()))
        return
    condenser = Condenser.from_pretrained(options.model, method="select", dtype=getattr(torch, options.dtype))
    tasks = tasks_of(options)
    if options.prompts:
        options.prompts.write_text(json.dumps(prompts(condenser, tasks)))
        return
    record: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    record |= {
        "date": datetime.now(UTC).date().isoformat(),
        "library": f"condense_core {__version__}",
        "model": condenser.model_id,
        "task": "squad" if options.squad else "facts",
        "dtype": options.dtype,
        "max_new_tokens": options.max_new_tokens,
    }
    contexts: list[dict[str, Any]] = record.setdefault("contexts", [])
    cells = [("full", 1.0), ("none", 0.0), *((name, share) for name in options.methods for share in options.shares)]
    for index, task in enumerate(tasks):
        while len(contexts) <= index:
            contexts.append({})
        missing = [(name, share) for name, share in cells if f"{without_path(name)}@{share:g}" not in contexts[index]]
        if not missing:
            continue
        started = time.monotonic()
        context = PrunedContext(condenser, task, options.max_new_tokens, options.chunk_size)
        for name, share in missing:
            contexts[index][f"{without_path(name)}@{share:g}"] = measured(context, name, share)
            write_atomically(options.out, (json.dumps(record) + "\n").encode(), "the record")
        print(f"context {index + 1} of {len(tasks)}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
