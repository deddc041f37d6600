"""The house: imports point one way, in no circle, and take nobody's privates; files can be held in mind."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
PACKAGE = CHECKOUT / "condense_core"

# What a part may import, beside itself. `kernels` is installed as `condense_core.kernels`.
MAY_IMPORT = {
    "kernels": set(),
    "ops": {"kernels"},
    "files": set(),
    "decoder": {"ops", "files"},
    "compressor": {"ops", "files", "decoder"},
    "pruning": {"ops", "files", "decoder"},
    "tasks": {"ops", "files", "decoder", "compressor", "pruning"},
    "training": {"ops", "files", "decoder", "compressor", "pruning", "tasks"},
    "cli": {"kernels", "ops", "files", "decoder", "compressor", "pruning", "tasks", "training"},
}
# The records of arguments, which import nothing of this project: what ops and their kernels agree upon.
SHARED = {"condense_core.ops.arguments"}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, the kernels at their installed place."""
    found = {}
    for root, prefix in ((PACKAGE, "condense_core"), (CHECKOUT / "kernels", "condense_core.kernels")):
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join([prefix, *(part for part in parts if part != "__init__")])] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[tuple[str, str | None, int]]:
    """(module, name or None, line) of every import of this package that runs, wherever in the file it stands."""
    tree = ast.parse(path.read_text())
    for_checkers = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in for_checkers:
            continue
        if isinstance(node, ast.Import):
            yield from (
                (alias.name, None, node.lineno) for alias in node.names if alias.name.startswith("condense_core")
            )
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("condense_core"):
            yield from ((node.module or "", alias.name, node.lineno) for alias in node.names)


def graph() -> dict[str, set[str]]:
    """Which modules each module imports; of `from package import module` the module."""
    edges: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        edges[module] = set()
        for target, name, _ in imports(path):
            full = f"{target}.{name}"
            edges[module].add(full if full in MODULES else target)
    return edges


def part(module: str) -> str:
    """`ops` of `condense_core.ops.select`; of what lies on top its own name."""
    return [*module.split("."), ""][1]


def test_imports_point_one_way() -> None:
    wrong = [
        f"{module} imports {target}"
        for module, targets in graph().items()
        for target in targets
        if target not in SHARED
        if (own := part(module)) in MAY_IMPORT
        if (other := part(target)) in MAY_IMPORT and other not in {own, *MAY_IMPORT[own]}
    ]
    assert wrong == []
    assert all(not list(imports(MODULES[module])) for module in SHARED)


def test_every_part_has_its_place_in_the_order() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists() and not path.is_symlink()}
    assert folders - set(MAY_IMPORT) == set()


def test_no_import_goes_in_a_circle() -> None:
    """Also not one that waits inside a function until it is called."""
    edges = graph()
    circles = [[module] for module in edges if module in reachable(module, edges)]
    assert circles == []


def reachable(module: str, edges: dict[str, set[str]]) -> set[str]:
    """What is imported when `module` is, and everything that it imports has been."""
    seen: set[str] = set()
    waiting = list(edges[module])
    while waiting:
        if (target := waiting.pop()) not in seen:
            seen.add(target)
            waiting += edges.get(target, ())
    return seen


def test_nobody_imports_another_module_s_privates() -> None:
    private = [
        f"{module}:{line} {target}.{name}"
        for module, path in MODULES.items()
        for target, name, line in imports(path)
        if name and name.startswith("_") and not name.startswith("__") and name not in ("_version", "_C")
    ]
    assert private == []


@pytest.mark.parametrize(
    ("folders", "limit"),
    [(("condense_core", "kernels", "csrc", "bench", "tools", "examples"), 400), (("tests",), 500)],
    ids=["code", "tests"],
)
def test_a_file_can_be_held_in_mind(folders: tuple[str, ...], limit: int) -> None:
    endings = {".py", ".h", ".cpp", ".cu", ".cuh", ".sh"}
    files = [path for folder in folders for path in (CHECKOUT / folder).rglob("*") if path.suffix in endings]
    lengths = {str(path.relative_to(CHECKOUT)): len(path.read_text().splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > limit} == {}
