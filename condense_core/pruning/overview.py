"""The table of methods and wrappers in docs/pruning.md: ``python -m condense_core.pruning.overview`` prints it."""

from __future__ import annotations

import re
import sys

from condense_core.pruning import METHODS, WRAPPERS, Method


def table() -> str:
    """Markdown: what each method is for, its paper, when it scores, what it always keeps."""
    lines = ["| name | class | | paper |", "|---|---|---|---|"]
    for registry in (METHODS, WRAPPERS):
        lines += [_row(name, kind) for name, kind in registry.items()]
        lines += ["| | | | |"] if registry is METHODS else []
    return "\n".join(lines)


def _row(name: str, kind: type[Method]) -> str:
    module = sys.modules[kind.__module__].__doc__ or ""
    what = " ".join(module.split("\n\n")[0].split()).partition(": ")[2]
    papers = re.findall(r"\d{4}\.\d{5}", kind.__doc__ or "")
    paper = f"[{papers[0]}](https://arxiv.org/abs/{papers[0]})" if papers else ""
    return f"| `{name}` | `{kind.__name__}` | {what} | {paper} |"


if __name__ == "__main__":
    print(table())
