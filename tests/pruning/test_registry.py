"""A method registers itself under its name when its class is defined, here and in a user's own file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import condense_core
from condense_core import pruning
from condense_core.pruning import METHODS, WRAPPERS, LayerContext, ScoringMethod, SnapKV, Traits, Wrapper
from condense_core.pruning.build import build, methods_by_name, wrappers_by_name

NEW_METHOD = """
from condense_core.pruning.base import ScoringMethod

class ValueNorm(ScoringMethod):
    name = "value_norm"
    summary = "tokens whose values have a large norm"

    def score(self, layer, q, k, v, ctx):
        return ctx.protect(v.float().norm(dim=-1))
"""


@pytest.fixture(autouse=True)
def registries_as_before() -> Iterator[None]:
    methods, wrappers = dict(METHODS), dict(WRAPPERS)
    yield
    for registry, before in ((METHODS, methods), (WRAPPERS, wrappers)):
        registry.clear()
        registry.update(before)


def test_a_method_of_ones_own_can_be_built_by_its_name() -> None:
    class ValueNorm(ScoringMethod):
        name = "value_norm"

        def score(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
            return ctx.protect(v.float().norm(dim=-1))

    method = build("adakv(value_norm)", keep=0.5)
    assert repr(method) == "AdaKV(ValueNorm(keep=0.5))"
    assert METHODS["value_norm"] is ValueNorm
    assert "value_norm" in methods_by_name()


def test_a_wrapper_of_ones_own_derives_its_traits() -> None:
    class Halved(Wrapper):
        name = "halved"

        @property
        def traits(self) -> Traits:
            return Traits(decodes=True)

        def score(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
            return self.method.score(layer, q, k, v, ctx) / 2

    assert build("halved(snapkv)", keep=0.5) == Halved(SnapKV(keep=0.5))
    assert "halved" in wrappers_by_name()
    with pytest.raises(ValueError, match="AdaKV: method is Halved"):
        pruning.AdaKV(Halved(SnapKV(keep=0.5)))


def test_a_class_without_a_name_of_its_own_is_not_registered() -> None:
    before = dict(METHODS)
    type("Wider", (SnapKV,), {})
    assert before == METHODS


@pytest.mark.parametrize("name", ["snapkv", "adakv"])
def test_a_name_that_another_class_has_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=f"Mine: name is '{name}', as that of (SnapKV|AdaKV); expected another"):
        type("Mine", (ScoringMethod,), {"name": name})
    assert METHODS["snapkv"] is SnapKV


@pytest.mark.parametrize("name", ["", "two words", "a(b)", 3])
def test_a_name_that_could_not_be_written_is_refused(name: Any) -> None:
    with pytest.raises(TypeError, match=r"Mine: name is .*, expected letters, digits and _"):
        type("Mine", (ScoringMethod,), {"name": name})


def test_a_class_that_is_defined_again_replaces_the_one_before() -> None:
    first, second = (type("Mine", (ScoringMethod,), {"name": "mine", "__module__": "notebook"}) for _ in range(2))
    assert first is not second
    assert METHODS["mine"] is second


def linked(source: Path, target: Path, *inside: str) -> Path:
    """A folder of links to what ``source`` holds; the folders ``inside`` one another are such folders themselves."""
    target.mkdir()
    for entry in source.iterdir():
        if entry.name != "__pycache__" and entry.name not in inside[:1]:
            (target / entry.name).symlink_to(entry)
    return linked(source / inside[0], target / inside[0], *inside[1:]) if inside else target


@pytest.mark.slow  # a process of its own that imports torch and transformers
def test_a_new_file_in_the_folder_is_all_that_a_method_needs(tmp_path: Path) -> None:
    package = Path(condense_core.__file__).parent
    methods = linked(package, tmp_path / "condense_core", "pruning", "methods")
    (methods / "value_norm.py").write_text(NEW_METHOD)
    code = """
from condense_core.pruning import METHODS, ValueNorm
from condense_core.pruning.build import build
assert METHODS["value_norm"] is ValueNorm
print(build("chunkkv(value_norm)", budget=9))
"""
    command, environment = [sys.executable, "-c", code], os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "ChunkKV(ValueNorm(budget=9))", done.stderr


def test_all_public_names_are_there() -> None:
    assert len(set(pruning.__all__)) == len(pruning.__all__)
    for kind in (*METHODS.values(), *WRAPPERS.values()):
        assert getattr(pruning, kind.__name__) is kind
        assert kind.__name__ in pruning.__all__
        assert kind.summary


def test_traits_of_a_wrapper_are_its_methods_and_its_own() -> None:
    inner = pruning.LeverageScore(keep=0.5)
    own = Traits(uses_previous=True, prefills_only=True, reads_rotary=True)
    assert inner.traits == own
    assert pruning.AdaKV(inner).traits == replace(own, ragged=True)
    assert pruning.Threshold(inner, 0.5).traits == replace(own, ragged=True, bounded=False)
    assert pruning.PyramidKV(pruning.ChunkKV(inner)).traits.layers_differ
