"""Methods by name: every name makes its method, and what is none is refused with what would be one."""

from __future__ import annotations

import pytest

from condense_core.pruning import METHODS, WRAPPERS, AdaKV, ChunkKV, QueryAware, SnapKV
from condense_core.pruning.build import build, has_window, methods_by_name, reads_question, wrappers_by_name


@pytest.mark.parametrize("name", methods_by_name())
def test_every_method_by_name(name: str) -> None:
    method = build(name, keep=0.25)
    assert type(method) is METHODS[name]
    assert method == METHODS[name](keep=0.25)
    assert build(name, budget=7) == METHODS[name](budget=7)
    assert has_window(name) == hasattr(method, "window")


@pytest.mark.parametrize("name", wrappers_by_name())
def test_every_wrapper_by_name(name: str) -> None:
    assert build(f"{name}(snapkv)", keep=0.25) == WRAPPERS[name](SnapKV(keep=0.25))


def test_what_a_name_is_not_enough_for() -> None:
    assert set(METHODS) - set(methods_by_name()) == {"kvzap", "qfilter"}
    assert set(WRAPPERS) - set(wrappers_by_name()) == {"per_layer", "threshold", "query_aware", "decoding"}


def test_names_inside_each_other() -> None:
    assert build(" adakv(chunkkv(snapkv)) ", keep=0.5) == AdaKV(ChunkKV(SnapKV(keep=0.5)))
    asked = build("adakv(snapkv)", keep=0.5, window=8, question_ids=[3, 4])
    assert asked == AdaKV(QueryAware(SnapKV(keep=0.5, window=8), (3, 4)))


def test_a_name_may_say_where_the_question_is_read() -> None:
    found = build("query_aware(chunkkv(snapkv))", keep=0.5, question_ids=[3, 4])
    assert found == QueryAware(ChunkKV(SnapKV(keep=0.5)), (3, 4))
    assert reads_question("adakv(query_aware(snapkv))")
    assert not reads_question("adakv(snapkv)")
    with pytest.raises(ValueError, match="wrapper: got 'query_aware', which needs the question, expected one of"):
        build("query_aware(snapkv)", keep=0.5)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("", {}, "method: got '', expected a name such as snapkv"),
        ("adakv(snapkv", {}, "method: got 'adakv"),
        ("adakv(snapkv))", {}, "method: got 'adakv"),
        ("adakv()", {}, "method: got 'adakv"),
        ("snapkv, tova", {}, "method: got 'snapkv, tova'"),
        ("adakv", {}, r"'adakv' is a wrapper; expected a method in it, as in adakv\(snapkv\)"),
        ("magic", {}, "method: got 'magic', expected one of compactor, "),
        ("qfilter", {}, "method: 'qfilter' needs filters, expected the path of its file behind it: qfilter:FILE"),
        ("adakv(kvzap)", {}, "method: 'kvzap' needs surrogate, expected the path"),
        ("kvzap:nowhere.safetensors", {}, "KVzap: surrogate is 'nowhere.safetensors', expected the path of"),
        ("snapkv:file", {}, "method: got snapkv:file, expected a file behind one of kvzap, qfilter only"),
        ("adakv(other:file)", {}, "method: got other:file, expected a file behind one of kvzap, qfilter only"),
        ("magic(snapkv)", {}, "wrapper: got 'magic', expected one of across_layers, adakv, "),
        ("threshold(snapkv)", {}, "wrapper: got 'threshold', which needs a threshold, expected one of"),
        ("keydiff", {"window": 8}, "window: 'keydiff' has none"),
        ("snapkv", {"keep": 0.0}, "keep is 0.0, expected a share in"),
        ("snapkv", {"budget": 3}, "expected one of them"),
        ("rerotate(adakv(snapkv))", {}, "Rerotate: method is"),
    ],
)
def test_what_is_no_method(spec: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(spec, **({"keep": 0.5} | options))
