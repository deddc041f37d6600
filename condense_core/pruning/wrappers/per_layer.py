"""PerLayer: every layer has a share of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace

from condense_core.pruning.base import Traits, Wrapper, check_share, share_of
from condense_core.pruning.wrappers.nesting import refuse_rotation, refuse_unbounded


@dataclass(frozen=True, repr=False)
class PerLayer(Wrapper):
    """Layer l keeps ``ceil(shares[l] * n)`` of n tokens, whatever budget the method has.

    Attributes:
        shares: share of the tokens that each layer keeps, in (0, 1], the first layer's first.
    """

    name = "per_layer"
    summary = "gives every layer a share of its own"
    needs = "a share for each layer"
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.shares, tuple):
            raise TypeError(f"PerLayer: shares is {self.shares!r}, expected a tuple with a number for each layer")
        if not self.shares:
            raise ValueError("PerLayer: shares is empty, expected a number for each layer")
        for layer_idx, share in enumerate(self.shares):
            check_share(f"PerLayer: shares[{layer_idx}]", share)
        refuse_unbounded(self)
        refuse_rotation(self)

    @property
    def traits(self) -> Traits:
        return replace(self.method.traits, layers_differ=True)

    def num_kept(self, num_tokens: int, layer_idx: int, num_layers: int) -> int:
        if len(self.shares) != num_layers:
            raise ValueError(
                f"PerLayer: shares has {len(self.shares)} entries, expected {num_layers}, one for each layer of the "
                "model"
            )
        return share_of(num_tokens, self.shares[layer_idx], None)
