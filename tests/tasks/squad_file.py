"""A file in SQuAD's format, written for the tests: no text of others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_SUBJECTS = ("harbor", "orchard", "railway", "museum", "brewery", "library", "quarry", "theater")


def squad_data(articles: int = 8, paragraphs: int = 5, *, sentences: int = 6) -> dict[str, Any]:
    """``articles`` articles of ``paragraphs`` paragraphs, some 60 * sentences characters each, three questions."""

    def paragraph(article: int, number: int) -> dict[str, Any]:
        subject, keeper, year = _SUBJECTS[article % 8], f"Keeper{article}x{number}", 1500 + 10 * article + number
        filler = " ".join(f"Nobody in part {i} of chapter {number} had expected as much." for i in range(sentences))
        text = f"The {subject} of ward {article}-{number} was opened in {year} by {keeper}. {filler}"
        return {
            "context": text,
            "qas": [
                question(text, f"Who opened the {subject} of ward {article}-{number}?", keeper, f"by {keeper}"),
                question(text, f"When was the {subject} of ward {article}-{number} opened?", str(year)),
                question(text, f"How many chapters? Name ward {article}-{number}.", f"chapter {number}"),
            ],
        }

    def question(text: str, asked: str, *answers: str) -> dict[str, Any]:
        found = [{"text": answer, "answer_start": text.index(answer)} for answer in answers]
        return {"id": asked, "question": asked, "answers": found}

    return {
        "version": "1.1",
        "data": [
            {"title": f"Article {a}", "paragraphs": [paragraph(a, p) for p in range(paragraphs)]}
            for a in range(articles)
        ],
    }


def write_squad(path: Path, **shape: Any) -> Path:
    """``squad_data`` as a file."""
    path.write_text(json.dumps(squad_data(**shape)), encoding="utf-8")
    return path
