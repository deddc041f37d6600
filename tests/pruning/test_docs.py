"""What docs/pruning.md says of methods and wrappers is what the registries hold."""

from pathlib import Path

from condense_core.pruning import METHODS, WRAPPERS, overview

DOCS = Path(__file__).resolve().parents[2] / "docs" / "pruning.md"


def test_the_table_of_methods_is_the_registry_s() -> None:
    text = DOCS.read_text()
    _, _, behind = text.partition("<!-- python -m condense_core.pruning.overview -->\n")
    table, _, _ = behind.partition("\n<!-- end -->")
    assert table == overview.table(), "run python -m condense_core.pruning.overview and paste what it prints"


def test_every_method_says_what_it_is_and_where_it_comes_from() -> None:
    for name, kind in (METHODS | WRAPPERS).items():
        row = next(line for line in overview.table().splitlines() if line.startswith(f"| `{name}` |"))
        _, _, class_name, what, paper, _ = (cell.strip() for cell in row.split("|"))
        assert class_name == f"`{kind.__name__}`"
        assert what == kind.summary != ""
        assert paper or name in ("random", "per_layer", "decoding")
