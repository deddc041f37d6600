"""QueryAware: the question that will be asked decides what stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from condense_core.pruning.base import LayerContext, Method, ScoringPass, Wrapper
from condense_core.pruning.wrappers.nesting import innermost


@dataclass(frozen=True, repr=False)
class QueryAware(Wrapper):
    """Reads the question behind the context, scores the context by its queries, and forgets it again.

    What the question attends to is what SnapKV's window (arXiv 2404.14469) and FINCH's prompt (TACL 2024) look for. The
    question is asked again later, of the pruned cache, so it takes no place in it.

    While the question is read, it is the last of the cache: a method's ``window`` lies on it, not on the end of the
    context. A window longer than the question is cut to the question, as it would protect tokens of the context
    otherwise; of a longer question the last ``window`` tokens score. No end of the context is protected, therefore.
    When nothing is read again, in evictions while text is generated, the method scores as it would alone.

    Attributes:
        question_ids: token ids of the question, as it will be asked; any sequence of them, kept as a tuple.
    """

    name = "query_aware"
    summary = "scores by the queries of the question that will be asked"
    paper = "2404.14469"
    needs = "the question"
    question_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        ids = self.question_ids
        if isinstance(ids, str) or not isinstance(ids, Sequence):
            raise TypeError(f"QueryAware: question_ids is {ids!r}, expected a sequence of ints, the token ids")
        if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
            raise TypeError(f"QueryAware: question_ids is {ids!r}, expected a sequence of ints, the token ids")
        object.__setattr__(self, "question_ids", tuple(ids))
        if not ids or min(ids) < 0:
            raise ValueError(f"QueryAware: question_ids is {ids}, expected at least one token id, all >= 0")
        if self.method.scoring_passes(1):
            raise ValueError(
                f"QueryAware: method is {self.method!r}, which has something else read behind the context; expected a "
                "method that scores by the last queries, such as SnapKV(keep=0.25)"
            )

    @property
    def protected(self) -> int:
        """Of the context: what the method protects besides its window."""
        return max(self.method.protected - _window(self.method), 0)

    def score(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        method = self.method if ctx.scoring_pass is None else _narrowed(self.method, len(self.question_ids))
        return method.score(layer, q, k, v, ctx)

    def scoring_passes(self, num_tokens: int) -> list[ScoringPass]:
        return [ScoringPass(prompt_ids=self.question_ids)]


def _narrowed(method: Method, width: int) -> Method:
    """``method`` with a window, where it has one, of at most ``width`` tokens."""
    if isinstance(method, Wrapper):
        return replace(method, method=_narrowed(method.method, width))
    if _window(method) > width:
        return replace(method, window=width)  # type: ignore[type-var]  # it has fields
    return method


def _window(method: Method) -> int:
    """The last tokens that the method, without its wrappers, looks from; 0 where it has no such field."""
    return int(getattr(innermost(method), "window", 0))
