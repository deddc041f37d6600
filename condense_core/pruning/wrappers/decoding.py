"""Decoding: the cache shrinks while text is generated, too."""

from __future__ import annotations

from dataclasses import dataclass, replace

from condense_core.pruning.base import Traits, Wrapper, check_count, check_share, share_of


@dataclass(frozen=True, repr=False)
class Decoding(Wrapper):
    """Once a layer holds ``interval`` tokens more than its target, the method prunes it to that.

    The target is ``budget``, or ``ceil(keep * n)`` after n tokens, prompt and answer together. The prefill is pruned by
    the method's own budget.

    Attributes:
        budget: tokens per head that stay, >= 1, or
        keep: share of all tokens so far that stays, in (0, 1].
        interval: steps between two prunings, >= 1: their cost is spread over so many tokens.
    """

    name = "decoding"
    summary = "evicts while text is generated, too"
    needs = "a budget of its own"
    budget: int | None = None
    interval: int = 64
    keep: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.budget is None) == (self.keep is None):
            raise ValueError(f"Decoding: got budget={self.budget}, keep={self.keep}; expected one of them")
        if self.budget is not None:
            check_count("Decoding: budget", self.budget, minimum=1)
        if self.keep is not None:
            check_share("Decoding: keep", self.keep)
        check_count("Decoding: interval", self.interval, minimum=1)
        if self.method.traits.ragged:
            raise ValueError(
                f"Decoding: method is {self.method!r}, whose heads hold different numbers of tokens, so that they "
                "would have to shrink at different steps; expected a method with the same number in every head, such "
                "as SnapKV(keep=0.25) without AdaKV or Threshold"
            )

        if self.method.traits.rotates:
            raise ValueError(
                f"Decoding: method is {self.method!r}, which moves keys to new positions, while the text that is being "
                "generated counts on from the old ones; expected a method without Rerotate"
            )

        if self.method.traits.prefills_only:
            raise ValueError(
                f"Decoding: method is {self.method!r}, which scores tokens while the prompt is read and only then; "
                "expected a method such as SnapKV(keep=0.25)"
            )

    @property
    def traits(self) -> Traits:
        return replace(self.method.traits, decodes=True)

    def decode_budget(self, num_held: int, num_tokens: int) -> int | None:
        target = share_of(num_tokens, self.keep, self.budget)
        return target if num_held >= target + self.interval else None
