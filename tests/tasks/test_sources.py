"""Where text comes from, and what is said when it cannot be had."""

from __future__ import annotations

import json
import lzma
import random
import sys
import tracemalloc
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from condense_core.tasks import sources
from condense_core.tasks.sources import ListSource, ProseWriter, open_source

TEXTS = ["First document.", "Second one, é.", "Third."]


def documents(path: str | Path) -> list[str]:
    source = open_source(path)
    return [source.document(i) for i in range(len(source))]


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts).encode()


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er.txt").mkdir(parents=True)  # a folder whose name looks like a file's
    (tmp_path / "b.txt").write_text(TEXTS[1], encoding="utf-8")
    (tmp_path / "a.md").write_text(TEXTS[0], encoding="utf-8")
    (tmp_path / "deep" / "c.txt").write_text(TEXTS[2], encoding="utf-8")
    (tmp_path / "d.txt").write_text(" \n")
    (tmp_path / "e.py").write_text("not text")
    assert documents(tmp_path) == TEXTS


def test_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text(TEXTS[1], encoding="utf-8")
    assert documents(path) == documents(str(path)) == [TEXTS[1]]


def test_json_lines_plain_and_compressed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines([*TEXTS, "  "]))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(json_lines(TEXTS)))
    assert documents(tmp_path / "a.jsonl") == documents(tmp_path / "a.jsonl.xz") == TEXTS


@pytest.mark.parametrize("line", [b"{", b"[]", b'"text"', b'{"txt": "a"}', b'{"text": 5}', b'{"text": null}', b""])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_malformed_line_is_named(tmp_path: Path, line: bytes, compressed: bool) -> None:
    content = json_lines(TEXTS) + line + b"\n" + json_lines(TEXTS)
    path = tmp_path / ("a.jsonl.xz" if compressed else "a.jsonl")
    path.write_bytes(lzma.compress(content) if compressed else content)
    with pytest.raises(ValueError, match='line 4: expected one JSON object a line with a string "text"') as caught:
        open_source(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"caf\xe9"),
        ("a.jsonl", json_lines(TEXTS) + b'{"text": "caf\xe9"}\n'),
        ("a.jsonl.xz", lzma.compress(b'{"text": "caf\xe9"}\n')),
        ("a.jsonl.xz", lzma.compress(json_lines(TEXTS))[:-20]),
        ("a.jsonl.xz", b"this was never compressed"),
    ],
    ids=["text", "json lines", "compressed", "truncated", "not compressed"],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for corpus in (path, tmp_path) if name == "a.txt" else (path,):
        with pytest.raises(ValueError, match="UTF-8") as caught:
            open_source(corpus)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "compressed"])
def test_json_lines_are_read_when_asked_for(tmp_path: Path, compressed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 documents of 100 kB: opening and reading them all holds no more than a few at once, in any order."""
    monkeypatch.setattr(sources, "_MAX_IN_MEMORY", 100_000)
    path = tmp_path / ("big.jsonl.xz" if compressed else "big.jsonl")
    with lzma.open(path, "wb", preset=0) if compressed else path.open("wb") as file:
        for i in range(40):
            file.write(json_lines([f"{i} " * (100_000 // (len(str(i)) + 1)), " "]))
    tracemalloc.start()
    source = open_source(path)
    order = random.Random(0).sample(range(len(source)), len(source))
    assert [source.document(i)[:3].split()[0] for i in order] == [str(i) for i in order]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(source) == 40
    assert peak < 10 * 100_000


def test_documents_may_be_read_by_several_threads(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines([f"document {i} " * 50 for i in range(50)]))
    source = open_source(tmp_path / "a.jsonl")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(source.document, list(range(50)) * 20))
    assert found == [f"document {i % 50} " * 50 for i in range(1000)]


@pytest.mark.parametrize("text", ["A line of text.\n" * 90, "\u5b57" * 500], ids=["lines", "one line"])
def test_a_large_text_file_is_several_documents(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_MAX_DOCUMENT", 1000)
    monkeypatch.setattr(sources, "_PART", 100)
    (tmp_path / "large.txt").write_text(text, encoding="utf-8")
    found = documents(tmp_path / "large.txt")
    assert len(found) > 10
    assert "".join(found) == text
    assert max(len(part.encode()) for part in found) <= 100


def test_text_of_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("some text".encode("utf-16-le"))
    with pytest.raises(ValueError, match=r"a.txt: a NUL at byte offset 1"):
        open_source(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"corpus: .*nowhere.txt does not exist; expected a folder"):
        open_source(tmp_path / "nowhere.txt")


@pytest.mark.parametrize("name", ["folder", "empty.txt", "empty.jsonl", "blank.jsonl"])
def test_nothing_in_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_bytes(json_lines(["", "\n"]))
    with pytest.raises(ValueError, match="holds no text; expected at least one document that is not empty") as caught:
        open_source(tmp_path / name)
    assert name in str(caught.value)


def test_a_dataset_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs the library 'datasets'; install condense-core\[hub\]"):
        open_source("dataset:maker/name")


def test_a_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> dict[str, list[str]]:
        assert (name, split) == ("maker/name", "train")
        return {"text": TEXTS}

    library = types.ModuleType("datasets")
    library.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert documents("dataset:maker/name") == TEXTS


def test_indices_wrap_round() -> None:
    source = ListSource(TEXTS)
    assert len(source) == 3
    assert source.document(4) == TEXTS[1]


def test_the_writer_needs_no_corpus_and_never_changes() -> None:
    writer = open_source(None)
    assert isinstance(writer, ProseWriter)
    first, second = writer.document(0), writer.document(1)
    assert first == ProseWriter().document(0)
    assert first != second
    assert min(len(first), len(second)) > 10_000
    assert first.startswith("After a while an engineer visited the smell of bread until t")
    sentences = first.replace("\n", " ").split(". ")
    assert len(set(sentences)) > 380
    assert all(sentence[0].isupper() for sentence in sentences)
