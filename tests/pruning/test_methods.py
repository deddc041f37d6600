"""The contract of scoring methods: listed, immutable, with settings that are checked."""

from __future__ import annotations

import math
from typing import Any

import pytest

from condense_core.pruning import methods
from condense_core.pruning.methods import METHODS
from condense_testing.pruning.method_cases import (
    ALL,
    INF,
    instances,
    make_case,
)


def test_every_method_is_listed_and_tested() -> None:
    tested = {name.split("/")[0] for name in ALL} | {"kvzip"}
    assert set(METHODS) == tested
    assert all(METHODS[name].name == name for name in METHODS)
    assert all(getattr(methods, method.__name__) is method for method in METHODS.values())


@pytest.mark.parametrize("name", ALL)
def test_methods_are_values(name: str) -> None:
    method, again = instances(2)[name], instances(2)[name]
    assert method == again
    assert hash(method) == hash(again)
    with pytest.raises(AttributeError):
        method.keep = 0.1  # type: ignore[misc]


PROTECTED = {
    "random": 0,
    "streaming_llm": 3,
    "knorm": 0,
    "keydiff": 0,
    "qfilter": 0,
    "kvzap": 3,
    "lagkv": 19,
    "lagkv/short": 132,
    "snapkv": 8,
    "tova": 1,
    "finch": 7,
    "finch/plain": 7,
    "observed_attention": 0,
    "peak_attention": 8,
    "surprise": 3,
    "expected_attention": 4,
    "expected_attention/mean": 0,
    "expected_attention/attention": 4,
    "leverage": 0,
    "leverage/wide": 0,
    "non_causal": 0,
    "non_causal/scaled": 0,
    "compactor": 12,
    "compactor/budget": 0,
    "compactor/blend": 11,
}


@pytest.mark.parametrize("name", ALL)
def test_protected(name: str) -> None:
    method = instances(2)[name]
    assert method.protected == PROTECTED[name]
    case = make_case()
    scores = method.score(None, case.q, case.k, case.v, case.ctx)
    forced = (scores == INF).sum(-1)
    if name == "lagkv":  # 80 tokens after the sinks are 5 full chunks: nothing follows the last
        assert (forced == 19).all()
    elif name == "lagkv/short":  # nothing to compare: the sinks alone
        assert (forced == 4).all()
    else:
        assert (forced == method.protected).all()


@pytest.mark.parametrize(
    ("kind", "settings", "error", "message"),
    [
        ("random", {"seed": -1}, ValueError, "Random: seed is -1, expected an int >= 0"),
        ("random", {"seed": 0.5}, TypeError, "Random: seed is 0.5, expected an int >= 0"),
        ("streaming_llm", {"sink": -1}, ValueError, "StreamingLLM: sink is -1, expected an int >= 0"),
        ("lagkv", {"lag": 0}, ValueError, "LagKV: lag is 0, expected an int >= 1"),
        ("lagkv", {"sink": True}, TypeError, "LagKV: sink is True, expected an int >= 0"),
        ("snapkv", {"window": 0}, ValueError, "SnapKV: window is 0, expected an int >= 1"),
        ("snapkv", {"kernel_size": 4}, ValueError, "SnapKV: kernel_size is 4, expected an odd int"),
        ("finch", {"window": 0}, ValueError, "Finch: window is 0, expected an int >= 1"),
        ("expected_attention", {"sink": -1}, ValueError, "ExpectedAttention: sink is -1, expected an int >= 0"),
        ("expected_attention", {"future": 0}, ValueError, "ExpectedAttention: future is 0, expected an int >= 1"),
        ("expected_attention", {"epsilon": -1.0}, ValueError, "epsilon is -1.0, expected a finite number >= 0"),
        ("expected_attention", {"epsilon": math.nan}, ValueError, "epsilon is nan, expected a finite number >= 0"),
        ("expected_attention", {"epsilon": "1"}, TypeError, "epsilon is '1', expected a number >= 0"),
        ("leverage", {"sketch": 0}, ValueError, "LeverageScore: sketch is 0, expected an int >= 1"),
        ("leverage", {"seed": None}, TypeError, "LeverageScore: seed is None, expected an int >= 0"),
        ("non_causal", {"chunk": 0}, ValueError, "NonCausal: chunk is 0, expected an int >= 1"),
        ("non_causal", {"scale": 0}, ValueError, "NonCausal: scale is 0, expected a finite number > 0"),
        ("non_causal", {"scale": None}, TypeError, "NonCausal: scale is None, expected a number > 0"),
        ("compactor", {"window": -1}, ValueError, "Compactor: window is -1, expected an int >= 0"),
        ("compactor", {"sketch": 0}, ValueError, "Compactor: sketch is 0, expected an int >= 1"),
        ("compactor", {"blending": -1}, ValueError, "Compactor: blending is -1, expected a finite number > 0"),
        ("kvzip", {"prompt_ids": [1]}, TypeError, r"KVzip: prompt_ids is \[1\], expected a tuple of token ids"),
        ("kvzip", {"prompt_ids": (1, -2)}, ValueError, r"KVzip: prompt_ids\[1\] is -2, expected an int >= 0"),
        ("kvzip", {"chunk": 0}, ValueError, "KVzip: chunk is 0, expected an int >= 1"),
    ],
)
def test_bad_settings(kind: str, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        METHODS[kind](keep=0.5, **settings)


@pytest.mark.parametrize("name", [name for name, kind in METHODS.items() if not kind.needs])
@pytest.mark.parametrize(
    ("budget", "error"),
    [
        ({}, ValueError),
        ({"keep": 0.5, "budget": 3}, ValueError),
        ({"keep": 1.5}, ValueError),
        ({"budget": 0}, ValueError),
    ],
)
def test_bad_budgets(name: str, budget: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=METHODS[name].__name__):
        METHODS[name](**budget)
