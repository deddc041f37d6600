"""The shape of the code: imports go one way and in no circle, privates stay private, files stay short.

Everything is read with ``ast``; nothing is imported. Imports inside functions and for type checkers count as well: a
circle that is only postponed is still a circle for the reader.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "condense_core": CHECKOUT / "condense_core",
    "condense_core.kernels": CHECKOUT / "kernels",
    "condense_core.neurons": CHECKOUT / "neurons",
}

RANK = {
    "_version": 0,
    "ops.arguments": 0,  # what ops hand to their backends, of which kernels are one
    "kernels": 1,
    "ops": 2,
    "files": 3,
    "decoder": 4,
    "prompt": 5,  # the former name of decoder.prompt
    "compressor": 5,
    "pruning": 5,
    "tasks": 6,
    "training": 7,
    "profiling": 7,
    "serving": 8,
    "cli": 9,
    "neurons": 10,
    "": 10,  # condense_core itself: the public face, which names what the others define
}
"""A part imports from itself and from parts of a lower rank. ``compressor`` and ``pruning`` know nothing of each other,
``ops`` and ``kernels`` nothing of models. ``ops`` finds kernels by their name when a backend is asked for.
"""

MOST_LINES = {"code": 400, "test": 500}
CODE = ("*.py", "*.cpp", "*.cu", "*.h")


def modules_of(packages: dict[str, Path]) -> dict[str, Path]:
    """The modules of ``packages`` by their full name."""
    found = {}
    for package, folder in packages.items():
        for path in sorted(folder.rglob("*.py")):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules_of(PACKAGES)
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imported(name: str, tree: ast.AST, modules: dict[str, Path]) -> Iterator[tuple[str, str]]:
    """What the module ``name`` imports of ``modules``: the module, and the name that it takes from it ("": itself)."""
    package = name if modules[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                if f"{source}.{alias.name}" in modules:
                    yield f"{source}.{alias.name}", ""
                elif source in modules:
                    yield source, alias.name


def graph_of(trees: dict[str, ast.Module], modules: dict[str, Path]) -> dict[str, set[str]]:
    """What each module imports."""
    return {name: {target for target, _ in imported(name, tree, modules)} - {name} for name, tree in trees.items()}


def part(module: str) -> str:
    """The part of ``condense_core`` that a module belongs to: a package, or a module that ``RANK`` names."""
    inside = module.removeprefix("condense_core").lstrip(".")
    return inside if inside in RANK else inside.partition(".")[0]


def test_no_module_imports_itself_through_others() -> None:
    try:
        TopologicalSorter(graph_of(TREES, MODULES)).prepare()
    except CycleError as error:
        pytest.fail("imports go in a circle: " + " <- ".join(error.args[1]))


def test_imports_go_one_way() -> None:
    wrong = [
        f"{module} imports {target}"
        for module, targets in graph_of(TREES, MODULES).items()
        for target in sorted(targets)
        if part(module) != part(target) and RANK[part(module)] <= RANK[part(target)]
    ]
    assert not wrong, "\n".join(wrong)


# -- privates ----------------------------------------------------------------------------------------------------------


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


@cache
def private_members(tree: ast.Module) -> set[str]:
    """The private names that the classes of a module define: methods, class variables, attributes of ``self``."""
    found = set()
    for kind in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for node in ast.walk(kind):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
    return {name for name in found if is_private(name)}


def taken_privates(name: str, trees: dict[str, ast.Module], modules: dict[str, Path]) -> list[str]:
    """Where a module uses a private name that it does not define and another module of the project does."""
    tree = trees[name]
    own = private_members(tree)
    others = set().union(*(private_members(other) for key, other in trees.items() if key != name)) - own
    aliases = {
        alias.asname or alias.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).startswith("condense_core")
    }
    found = [f"imports {target}.{what}" for target, what in imported(name, tree, modules) if is_private(what)]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not is_private(node.attr):
            continue
        of_module = isinstance(node.value, ast.Name) and node.value.id in aliases and node.attr not in own
        of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        if of_module or (node.attr in others and not of_self):
            found.append(f"line {node.lineno} uses .{node.attr}")
    return found


@pytest.mark.parametrize("name", TREES)
def test_nobody_uses_the_privates_of_another_module(name: str) -> None:
    assert taken_privates(name, TREES, MODULES) == []


# -- sizes -------------------------------------------------------------------------------------------------------------


def files_of(kind: str) -> list[Path]:
    tests = sorted((CHECKOUT / "tests").rglob("*.py")) + sorted((CHECKOUT / "bench").glob("test_*.py"))
    if kind == "test":
        return tests
    folders = ("condense_core", "kernels", "neurons", "csrc", "bench", "examples")
    found = itertools.chain.from_iterable((CHECKOUT / name).rglob(suffix) for name in folders for suffix in CODE)
    return sorted({*found, CHECKOUT / "setup.py"} - {*tests})


@pytest.mark.parametrize("kind", MOST_LINES)
def test_files_can_be_held_in_mind(kind: str) -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in files_of(kind)}
    long = {path.relative_to(CHECKOUT).as_posix(): n for path, n in lengths.items() if n > MOST_LINES[kind]}
    assert not long, f"files of {kind} above {MOST_LINES[kind]} lines; expected them to be split by subject: {long}"


# -- the checks themselves ---------------------------------------------------------------------------------------------


def check_on(sources: dict[str, str]) -> tuple[dict[str, ast.Module], dict[str, Path]]:
    """A project of the modules ``sources``, which exists on paper only."""
    return {name: ast.parse(text) for name, text in sources.items()}, {name: Path(f"{name}.py") for name in sources}


@pytest.mark.parametrize(
    "back",
    [
        "import condense_core.a",
        "from condense_core.a import f",
        "from condense_core import a",
        "from . import a",
        "from .a import f",
        "def later():\n    from condense_core.a import f",
        "if TYPE_CHECKING:\n    from condense_core.a import f",
    ],
)
def test_every_kind_of_import_is_seen(back: str) -> None:
    trees, modules = check_on({"condense_core.a": "from condense_core.b import g", "condense_core.b": back})
    with pytest.raises(CycleError):
        TopologicalSorter(graph_of(trees, modules)).prepare()


@pytest.mark.parametrize(
    "use",
    [
        "def f(layer): return layer._keys",
        "def f(cache): return cache.layers[0]._keys",
        "from condense_core.a import _helper",
        "from condense_core import a\ndef f(): return a._helper()",
    ],
)
def test_taken_privates_are_seen(use: str) -> None:
    trees, modules = check_on(
        {
            "condense_core.a": "def _helper(): ...\nclass A:\n    def __init__(self): self._keys = 1",
            "condense_core.b": use,
        }
    )
    assert len(taken_privates("condense_core.b", trees, modules)) == 1
    assert taken_privates("condense_core.a", trees, modules) == []
