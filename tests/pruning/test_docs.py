"""What docs/pruning.md says of methods and wrappers is what the registries hold."""

import re
from pathlib import Path

import torch

from condense_core.pruning import METHODS, WRAPPERS, ScoringMethod, overview
from condense_core.pruning.build import build
from condense_testing.pruning import layers

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


def test_the_method_of_the_page_is_one() -> None:
    """Six lines, without imports, that define, register and score."""
    code = re.search(r"```python\n(class ValueNorm.*?)```", DOCS.read_text(), re.DOTALL)
    assert code is not None
    names = {"ScoringMethod": ScoringMethod}
    try:
        exec(code[1], names)
        method = build("value_norm", keep=0.5)
    finally:
        METHODS.pop("value_norm", None)
    case = layers.build(heads=4, kv_heads=2, lengths=(20, 9), padding="left", dtype=torch.float32)
    ctx = case.context(method)
    scores, (start, stop) = method.score(case.module, case.q, case.k, case.v, ctx), ctx.bounds[1].tolist()
    assert torch.equal(scores[1, :, start:stop], case.v[1, :, start:stop].norm(dim=-1))
    assert scores[1, :, :start].isneginf().all()
    assert len([line for line in code[1].splitlines() if line]) <= 6
