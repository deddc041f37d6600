"""The tables of methods and wrappers in docs/pruning.md: ``python -m condense_core.pruning.overview`` prints them."""

from __future__ import annotations

from collections.abc import Mapping

from condense_core.pruning import METHODS, WRAPPERS, Method


def table() -> str:
    """Markdown: what each method of this package keeps, what each wrapper does, and the papers."""
    return "\n\n".join((_table("method", "keeps", METHODS), _table("wrapper", "does", WRAPPERS)))


def _table(what: str, verb: str, registry: Mapping[str, type[Method]]) -> str:
    own = (kind for _, kind in sorted(registry.items()) if kind.__module__.startswith("condense_core."))
    return "\n".join((f"| {what} | class | {verb} | paper |", "|---|---|---|---|", *map(_row, own)))


def _row(kind: type[Method]) -> str:
    paper = f"[{kind.paper}](https://arxiv.org/abs/{kind.paper})" if kind.paper else ""
    return f"| `{kind.name}` | `{kind.__name__}` | {kind.summary} | {paper} |"


if __name__ == "__main__":
    print(table())
