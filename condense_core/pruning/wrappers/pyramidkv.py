"""PyramidKV: the first layers keep more, the last ones less."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

from condense_core.pruning.base import Traits, Wrapper, check_count
from condense_core.pruning.wrappers.nesting import refuse_rotation, refuse_unbounded


@dataclass(frozen=True, repr=False)
class PyramidKV(Wrapper):
    """Budgets fall linearly from the first to the last layer, and are the method's on average.

    Cai et al., arXiv 2406.02069.

    With m the method's budget for n tokens, layer l of L keeps ``(2m - low) - l * 2(m - low) / (L - 1)``, rounded, of
    which the last layer's is ``low = max(m / beta, protected, 2m - n)``, at most m: no layer keeps less than the
    protected tokens, unless m does, none more than all. Rounding is symmetric around the middle layer, so that the
    layers keep ``L * m`` tokens together, to the token. kvpress 0.5.5 gives every layer the same where ``m / beta``
    falls below the window, instead of a flatter pyramid, and its first layer at most n - window; elsewhere it agrees.

    Attributes:
        beta: how many times less than the mean the last layer keeps, >= 1; 1 makes all layers equal.
    """

    name = "pyramidkv"
    summary = "gives the first layers more and the last ones less"
    paper = "2406.02069"
    beta: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("PyramidKV: beta", self.beta, minimum=1)
        refuse_unbounded(self)
        refuse_rotation(self)
        if self.method.traits.layers_differ:
            raise ValueError(
                f"PyramidKV: method is {self.method!r}, whose layers keep different numbers of tokens already; "
                "expected a method with one budget for all layers, such as SnapKV(keep=0.25)"
            )

    @property
    def traits(self) -> Traits:
        return replace(self.method.traits, layers_differ=True)

    def num_kept(self, num_tokens: int, layer_idx: int, num_layers: int) -> int:
        mean = self.method.num_kept(num_tokens, layer_idx, num_layers)
        if num_layers == 1:
            return mean
        low = min(mean, max(-(-mean // self.beta), self.protected, 2 * mean - num_tokens))
        drop = 2 * (mean - low)
        # Exact, and half to even of an even drop: layer l and layer L-1-l round in opposite directions.
        return mean + mean - low - round(Fraction(layer_idx * drop, num_layers - 1))
