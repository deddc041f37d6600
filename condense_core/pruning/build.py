"""Methods by name, as a command line writes them: ``snapkv``, ``adakv(snapkv)``, ``adakv(chunkkv(snapkv))``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from condense_core.pruning.base import Method
from condense_core.pruning.methods import METHODS
from condense_core.pruning.wrappers import WRAPPERS, QueryAware


def methods_by_name() -> tuple[str, ...]:
    """The methods that a name and a budget are enough for, in alphabetical order."""
    return tuple(sorted(name for name, kind in METHODS.items() if not kind.needs))


def wrappers_by_name() -> tuple[str, ...]:
    """The wrappers that a method inside is enough for, in alphabetical order."""
    return tuple(sorted(name for name, kind in WRAPPERS.items() if not kind.needs))


def build(
    spec: str,
    *,
    keep: float | None = None,
    budget: int | None = None,
    window: int | None = None,
    question_ids: Sequence[int] | None = None,
) -> Method:
    """The method that ``spec`` names, with wrappers around it.

    Args:
        spec: names inside each other; behind a method that needs a file, such as kvzap, a colon and its path:
            ``across_layers(kvzap:kvzap.safetensors)``.
        keep, budget: how much stays, one of them.
        window: the last tokens that score, for methods that have such a setting.
        question_ids: tokens of the question that is to decide what stays; None: it is not known. ``spec`` may say where
            the question is read, as in ``sentences(query_aware(peak_attention))``; by default the innermost method
            reads it.

    Raises:
        ValueError: a name is unknown or needs settings that have no name here, or names do not go together.
    """
    outer, name, path = _parsed(spec)
    settings: dict[str, Any] = {}
    if path:
        settings[METHODS[name].needs] = path
    if window is not None:
        if not has_window(spec):
            raise ValueError(f"window: {name!r} has none; expected a method that scores by its last queries, as snapkv")
        settings["window"] = window
    method: Method = METHODS[name](keep=keep, budget=budget, **settings)
    if question_ids is not None and QueryAware.name not in outer:
        outer.append(QueryAware.name)
    for wrapper in reversed(outer):
        if wrapper != QueryAware.name:
            method = WRAPPERS[wrapper](method)
        elif question_ids is None:
            _check_known("wrapper", wrapper, WRAPPERS, wrappers_by_name())
        else:
            method = QueryAware(method, tuple(question_ids))
    return method


def fitting_keep(spec: str, keep: float, num_tokens: int, question_ids: Sequence[int] | None = None) -> float:
    """``keep``, a share that nobody asked for, or 1 for a text so short that it is less than ``spec`` protects."""
    tried = build(spec, keep=keep, question_ids=question_ids)
    return 1.0 if num_tokens > tried.protected > tried.num_kept(num_tokens, 0, 1) else keep


def reads_question(spec: str) -> bool:
    """Whether ``spec`` names a method that must be given the question: one with ``query_aware`` in it."""
    return QueryAware.name in _parsed(spec)[0]


def has_window(spec: str) -> bool:
    """Whether the method that ``spec`` names scores by its last queries, of which there may be more or fewer."""
    return "window" in {field.name for field in fields(METHODS[_parsed(spec)[1]])}


def without_path(spec: str) -> str:
    """``spec`` as a name: what stands behind a colon left out."""
    return re.sub(r":[^()]*", "", spec)


def _parsed(spec: str) -> tuple[list[str], str, str | None]:
    """The wrappers from the outside in, the method, and the path behind it."""
    parts = re.fullmatch(r"((?:\w+\()*)(\w+)(?::([^()]+))?(\)*)", spec.strip())
    if parts is None or parts[1].count("(") != len(parts[4]):
        raise ValueError(
            f"method: got {spec!r}, expected a name such as snapkv, or names inside each other as in adakv(snapkv)"
        )
    outer, name, path = parts[1].split("(")[:-1], parts[2], parts[3]
    if name in WRAPPERS:
        raise ValueError(f"method: {name!r} is a wrapper; expected a method in it, as in {name}(snapkv)")
    if name in METHODS and METHODS[name].needs and path is None:
        raise ValueError(
            f"method: {name!r} needs {METHODS[name].needs}, expected the path of its file behind it: {name}:FILE"
        )
    if path is None:
        _check_known("method", name, METHODS, methods_by_name())
    elif name not in METHODS or not METHODS[name].needs:
        needing = ", ".join(sorted(own for own, kind in METHODS.items() if kind.needs))
        raise ValueError(f"method: got {name}:{path}, expected a file behind one of {needing} only")
    for wrapper in outer:
        _check_known("wrapper", wrapper, WRAPPERS, tuple(sorted((*wrappers_by_name(), QueryAware.name))))
    return outer, name, path


def _check_known(what: str, name: str, registry: Mapping[str, type[Method]], by_name: tuple[str, ...]) -> None:
    if name in by_name:
        return
    needs = f", which needs {registry[name].needs}" if name in registry else ""
    raise ValueError(f"{what}: got {name!r}{needs}, expected one of {', '.join(by_name)}")
