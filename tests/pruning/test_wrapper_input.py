"""Wrappers as they are written: how they are shown, and what they refuse."""

from dataclasses import FrozenInstanceError
from math import inf as INF
from math import nan as NAN
from typing import Any

import pytest
from torch import Tensor

from condense_core.pruning.base import LayerContext, Method, ScoringMethod, ScoringPass
from condense_core.pruning.methods import Compactor, KVzip, SnapKV
from condense_core.pruning.wrappers import (
    AdaKV,
    ChunkKV,
    CriticalKV,
    Decoding,
    Merge,
    PerLayer,
    PyramidKV,
    QueryAware,
    Rerotate,
    Threshold,
)

SNAP = SnapKV(keep=0.5)


@pytest.mark.parametrize(
    ("method", "shown"),
    [
        (AdaKV(SNAP), "AdaKV(SnapKV(keep=0.5))"),
        (
            AdaKV(CriticalKV(SNAP, first_share=0.25), 0),
            "AdaKV(CriticalKV(SnapKV(keep=0.5), first_share=0.25), floor=0)",
        ),
        (PyramidKV(SNAP, beta=5), "PyramidKV(SnapKV(keep=0.5), beta=5)"),
        (PerLayer(SNAP, (0.5, 1)), "PerLayer(SnapKV(keep=0.5), shares=(0.5, 1))"),
        (Rerotate(ChunkKV(SNAP, 4)), "Rerotate(ChunkKV(SnapKV(keep=0.5), chunk=4))"),
        (Merge(Threshold(SNAP, 0.1)), "Merge(Threshold(SnapKV(keep=0.5), threshold=0.1))"),
        (Decoding(SNAP, keep=0.1), "Decoding(SnapKV(keep=0.5), keep=0.1)"),
        (QueryAware(SNAP, (1, 2)), "QueryAware(SnapKV(keep=0.5), question_ids=(1, 2))"),
    ],
)
def test_a_method_is_shown_as_it_is_written(method: Method, shown: str) -> None:
    assert repr(method) == shown
    assert eval(shown) == method
    assert hash(eval(shown)) == hash(method)
    with pytest.raises(FrozenInstanceError):
        method.method = SNAP  # type: ignore[attr-defined]


class Reads(ScoringMethod):
    """Has the context read again, in parts."""

    def score(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        raise NotImplementedError

    def scoring_passes(self, num_tokens: int) -> list[ScoringPass]:
        return [ScoringPass(start=i, stop=i + 10) for i in range(0, num_tokens, 10)]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: AdaKV(SNAP, 1.5), ValueError, "AdaKV: floor is 1.5, expected a share"),
        (lambda: AdaKV(SNAP, "x"), TypeError, "AdaKV: floor is 'x', expected a number"),
        (lambda: AdaKV(Threshold(SNAP, 0.1)), ValueError, r"AdaKV: method is Threshold.*without a budget; expected"),
        (lambda: AdaKV(Rerotate(SNAP)), ValueError, "AdaKV: method is Rerotate.*expected a method without Rerotate"),
        (lambda: AdaKV(Decoding(SNAP, 9)), ValueError, "AdaKV: method is Decoding.*expected a method without Decoding"),
        (lambda: PyramidKV(SNAP, 0), ValueError, "PyramidKV: beta is 0, expected an int >= 1"),
        (lambda: PyramidKV(SNAP, 2.5), TypeError, "PyramidKV: beta is 2.5, expected an int >= 1"),
        (lambda: PyramidKV(Merge(Rerotate(SNAP))), ValueError, "PyramidKV: method is .*without Rerotate"),
        (
            lambda: PyramidKV(PerLayer(SNAP, (0.5,))),
            ValueError,
            "PyramidKV: method is PerLayer.*expected a method with",
        ),
        (lambda: PyramidKV(Threshold(SNAP, 0.1)), ValueError, "PyramidKV: method is Threshold.*without a budget"),
        (lambda: PerLayer(SNAP, [0.5]), TypeError, r"PerLayer: shares is \[0.5\], expected a tuple"),
        (lambda: PerLayer(SNAP, ()), ValueError, "PerLayer: shares is empty, expected a number for each layer"),
        (lambda: PerLayer(SNAP, (0.5, 0)), ValueError, r"PerLayer: shares\[1\] is 0, expected a share"),
        (lambda: PerLayer(Rerotate(SNAP), (0.5,)), ValueError, "PerLayer: method is Rerotate.*without Rerotate"),
        (lambda: PerLayer(Threshold(SNAP, 1), (0.5,)), ValueError, "PerLayer: method is Threshold.*without a budget"),
        (lambda: ChunkKV(SNAP, 0), ValueError, "ChunkKV: chunk is 0, expected an int >= 1"),
        (lambda: ChunkKV(SNAP, True), TypeError, "ChunkKV: chunk is True, expected an int >= 1"),
        (lambda: CriticalKV(SNAP, -1.0), ValueError, "CriticalKV: epsilon is -1.0, expected a finite number >= 0"),
        (lambda: CriticalKV(SNAP, NAN), ValueError, "CriticalKV: epsilon is nan, expected a finite number >= 0"),
        (lambda: CriticalKV(SNAP, "1"), TypeError, "CriticalKV: epsilon is '1', expected a number >= 0"),
        (lambda: CriticalKV(SNAP, 0, 2), ValueError, "CriticalKV: first_share is 2, expected a share"),
        (lambda: CriticalKV(Threshold(SNAP, 0.1)), ValueError, "CriticalKV: method is Threshold.*without a budget"),
        (
            lambda: CriticalKV(Reads(keep=0.5)).scoring_passes(25),
            ValueError,
            "CriticalKV: .*25 tokens again in 3 parts; expected",
        ),
        (lambda: Rerotate(AdaKV(SNAP)), ValueError, "Rerotate: method is AdaKV.*in every head.*without AdaKV"),
        (lambda: Rerotate(Merge(Threshold(SNAP, 0.1))), ValueError, "Rerotate: method is Merge.*without .*Threshold"),
        (lambda: Rerotate(Merge(PyramidKV(SNAP))), ValueError, "Rerotate: method is Merge.*layers.*without PyramidKV"),
        (lambda: Rerotate(PerLayer(SNAP, (0.5,))), ValueError, "Rerotate: method is PerLayer.*without .*PerLayer"),
        (lambda: Rerotate(Merge(Rerotate(SNAP))), ValueError, "Rerotate: method is Merge.*moves the keys already"),
        (lambda: Threshold(SNAP, INF), ValueError, "Threshold: threshold is inf, expected a finite number"),
        (lambda: Threshold(SNAP, None), TypeError, "Threshold: threshold is None, expected a number"),
        (lambda: Threshold(SNAP, 0.1, -1), ValueError, "Threshold: sink is -1, expected an int >= 0"),
        (lambda: Threshold(SNAP, 0.1, 4, -1), ValueError, "Threshold: window is -1, expected an int >= 0"),
        (lambda: Threshold(Rerotate(SNAP), 0.1), ValueError, "Threshold: method is Rerotate.*without Rerotate"),
        (lambda: Threshold(Decoding(SNAP, 9), 0.1), ValueError, "Threshold: method is Decoding.*without Decoding"),
        (lambda: Decoding(SNAP), ValueError, "Decoding: got budget=None, keep=None; expected one of them"),
        (lambda: Decoding(SNAP, 5, keep=0.5), ValueError, "Decoding: got budget=5, keep=0.5; expected one of them"),
        (lambda: Decoding(SNAP, 0), ValueError, "Decoding: budget is 0, expected an int >= 1"),
        (lambda: Decoding(SNAP, keep=1.5), ValueError, "Decoding: keep is 1.5, expected a share"),
        (lambda: Decoding(SNAP, 5, 0), ValueError, "Decoding: interval is 0, expected an int >= 1"),
        (lambda: Decoding(AdaKV(SNAP), 5), ValueError, "Decoding: method is AdaKV.*in every head.*without AdaKV"),
        (lambda: Decoding(Rerotate(SNAP), 5), ValueError, "Decoding: method is Rerotate.*expected .* without Rerotate"),
        (lambda: Rerotate(Decoding(SNAP, 5)), ValueError, "Rerotate: method is Decoding.*expected .* without Decoding"),
        (lambda: Decoding(ChunkKV(KVzip(keep=0.5)), 5), ValueError, "Decoding: method is .* while the prompt is read"),
        (
            lambda: Decoding(Compactor(keep=0.5), 5),
            ValueError,
            "Decoding: .*Compactor.*while the prompt is read",
        ),
        (lambda: QueryAware(SNAP, "1"), TypeError, "QueryAware: question_ids is '1', expected a sequence of ints"),
        (
            lambda: QueryAware(SNAP, (1.0,)),
            TypeError,
            r"QueryAware: question_ids is \(1.0,\), expected a sequence of ints",
        ),
        (lambda: QueryAware(SNAP, ()), ValueError, r"QueryAware: question_ids is \(\), expected at least one token id"),
        (lambda: QueryAware(SNAP, (-1,)), ValueError, r"QueryAware: question_ids is \(-1,\), expected at least one"),
        (lambda: QueryAware(Reads(keep=0.5), (1,)), ValueError, "QueryAware: method is .* read behind the context"),
    ],
)
def test_bad_input_is_named(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("wrapper", "rest"),
    [
        (AdaKV, ()),
        (PyramidKV, ()),
        (PerLayer, ((1.0,),)),
        (ChunkKV, ()),
        (CriticalKV, ()),
        (Rerotate, ()),
        (Threshold, (0.1,)),
        (Merge, ()),
        (Decoding, (5,)),
        (QueryAware, ((1,),)),
    ],
)
def test_a_wrapper_wants_a_method(wrapper: Any, rest: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError, match=rf"{wrapper.__name__}: method is str, expected a pruning method such as"):
        wrapper("snapkv", *rest)
