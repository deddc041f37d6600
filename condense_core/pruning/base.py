"""The contract of a pruning method: it scores the cached tokens of an attention layer, a budget says how many stay.

Shapes: B sequences, H query heads, G key-value heads, D head_dim; N cached tokens (columns of k and v, padding
included), Q queries of the present pass, which belong to the last Q of the N columns.

A method goes through stages, each of which a wrapper may change and otherwise passes on: ``score`` what a token is
worth in a layer, ``across`` all layers if it must, ``select`` which tokens stay, ``compact`` the cache to them.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from condense_core import ops
from condense_core.pruning.context import LayerContext as LayerContext
from condense_core.pruning.context import ScoringPass as ScoringPass
from condense_core.pruning.prompt import Prompt


@dataclass(frozen=True)
class Kept:
    """The columns that stay, ascending in every head.

    indices: ``[B, G, M]`` int64, or ``[R]`` where heads or sequences keep different numbers: head n = b*G + g in
    ``cu_seqlens[n]`` to ``cu_seqlens[n + 1]``. cu_seqlens: ``[B*G+1]`` int32, or None.
    """

    indices: Tensor
    cu_seqlens: Tensor | None = None


@dataclass(frozen=True)
class Traits:
    """What the rest of the pipeline must know of a method.

    Attributes:
        uses_previous: ``score`` wants ``ctx.previous``: it scores a token once, with queries that are gone later.
        prefills_only: only the queries of a prefill can score, so that text being generated cannot be evicted.
        ragged: heads of one layer may keep different numbers of tokens.
        layers_differ: layers may keep different numbers of tokens.
        reads_rotary: ``score`` uses ``ctx.rotary``, ``ctx.cos`` or ``ctx.sin``.
        rotates: kept tokens move to the positions 0, 1, 2, ... of their sequence.
        decodes: ``decode_budget`` may ask for less.
        bounded: ``num_kept`` limits what stays; False: ``select`` alone decides.
        whole_model: ``across`` does something: nothing is selected before all layers have been scored.
        reads_surprise: ``across`` uses ``ctx.surprise``, which costs the logits of every token.
        any_budget: ``score`` looks neither at ``keep`` nor at a budget, so that one score serves all of them.
    """

    uses_previous: bool = False
    prefills_only: bool = False
    ragged: bool = False
    layers_differ: bool = False
    reads_rotary: bool = False
    rotates: bool = False
    decodes: bool = False
    bounded: bool = True
    whole_model: bool = False
    reads_surprise: bool = False
    any_budget: bool = False


class Method(ABC):
    """A way to prune. Immutable; what a pass needs to know is in the ``LayerContext``.

    A class with a ``name`` of its own is registered under it, in ``METHODS`` or ``WRAPPERS``, when it is defined.

    Attributes:
        name: what a command line calls it; letters, digits and _.
        summary: what it keeps, in a line.
        paper: the arXiv number of its source; empty: none.
        needs: what has to be set before it can be built by its name and a budget; empty: nothing.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    needs: ClassVar[str] = ""

    @property
    def traits(self) -> Traits:
        """A class attribute of a method that differs from the defaults; a wrapper derives it from its method's."""
        return Traits()

    @abstractmethod
    def score(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        """What each cached token is worth.

        Args:
            layer: the attention module, ``ctx.module``.
            q: ``[B, H, Q, D]`` after RoPE.
            k: ``[B, G, N, D]`` after RoPE.
            v: ``[B, G, N, D]``.

        Returns:
            ``[B, G, N]`` float32, higher for tokens to keep: +inf for what must stay, -inf for padding.
        """

    @abstractmethod
    def num_kept(self, num_tokens: int, layer_idx: int, num_layers: int) -> int:
        """Tokens per head that layer ``layer_idx`` keeps of ``num_tokens``, in [0, num_tokens]."""

    @property
    def protected(self) -> int:
        """Tokens of every sequence that are kept whatever they score."""
        return 0

    def across(self, scores: Sequence[Tensor], contexts: Sequence[LayerContext]) -> list[Tensor]:
        """The scores that ``select`` is given, once all layers have been scored, where ``traits.whole_model``.

        Args:
            scores: of each layer, as ``score`` returned them.
            contexts: of the same layers.

        Returns:
            As many tensors of the same shapes.
        """
        return list(scores)

    def for_prompt(self, prompt: Prompt) -> Method:
        """The method for one text, whose prompt is known: with settings of its own that depend on it filled in."""
        return self

    def select(self, scores: Tensor, ctx: LayerContext) -> Kept:
        """The tokens of the highest scores, ``ctx.budgets`` in every head."""
        return keep_best(scores, ctx, "head")

    def compact(self, k: Tensor, v: Tensor, kept: Kept, ctx: LayerContext) -> tuple[Tensor, Tensor]:
        """Keys and values of the kept tokens, in the layout of ``kept.indices``."""
        keys, values = ops.compact(k, v, kept.indices, cu_indices=kept.cu_seqlens)
        return keys, values

    def scoring_passes(self, num_tokens: int) -> list[ScoringPass]:
        """The scoring passes that a context of ``num_tokens`` needs behind its prefill; empty: none.

        ``score`` is called in each; a token's score is the largest that it returned.
        """
        return []

    def decode_budget(self, num_held: int, num_tokens: int) -> int | None:
        """To how many tokens per head a layer shrinks while text is being generated; None: it stays as it is.

        The layer holds ``num_held`` tokens per head after ``num_tokens`` were read.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class ScoringMethod(Method):
    """A method with a budget of its own.

    Attributes:
        keep: share of the tokens that stay, in (0, 1].
        budget: instead of it, how many stay, >= 1.
    """

    keep: float | None = None
    budget: int | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _register(cls, METHODS, WRAPPERS)

    def __post_init__(self) -> None:
        name = type(self).__name__
        if (self.keep is None) == (self.budget is None):
            raise ValueError(f"{name}: got keep={self.keep}, budget={self.budget}; expected one of them")
        if self.keep is not None:
            check_share(f"{name}: keep", self.keep)
        if self.budget is not None:
            check_count(f"{name}: budget", self.budget, minimum=1)

    def __repr__(self) -> str:
        hidden = {f.name for f in self.__dataclass_fields__.values() if not f.repr}
        shown = (f"{key}={value!r}" for key, value in self.settings().items() if key not in hidden)
        return f"{type(self).__name__}({', '.join(shown)})"

    def settings(self) -> dict[str, Any]:
        """The fields that are not at their default."""
        fields = self.__dataclass_fields__.values()
        return {f.name: getattr(self, f.name) for f in fields if getattr(self, f.name) != f.default}

    def num_kept(self, num_tokens: int, layer_idx: int, num_layers: int) -> int:
        return share_of(num_tokens, self.keep, self.budget)


@dataclass(frozen=True, repr=False)
class Wrapper(Method):
    """Changes one stage of ``method`` and passes the others on."""

    method: Method

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _register(cls, WRAPPERS, METHODS)

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise TypeError(
                f"{type(self).__name__}: method is {type(self.method).__name__}, expected a pruning method such as "
                "SnapKV(keep=0.25)"
            )

    def __repr__(self) -> str:
        fields = [f for f in self.__dataclass_fields__.values() if f.repr and f.name != "method"]
        own = [f"{f.name}={getattr(self, f.name)!r}" for f in fields if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join([repr(self.method), *own])})"

    @property
    def traits(self) -> Traits:
        return self.method.traits

    @property
    def protected(self) -> int:
        return self.method.protected

    def score(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        return self.method.score(layer, q, k, v, ctx)

    def num_kept(self, num_tokens: int, layer_idx: int, num_layers: int) -> int:
        return self.method.num_kept(num_tokens, layer_idx, num_layers)

    def across(self, scores: Sequence[Tensor], contexts: Sequence[LayerContext]) -> list[Tensor]:
        return self.method.across(scores, contexts)

    def for_prompt(self, prompt: Prompt) -> Method:
        return replace(self, method=self.method.for_prompt(prompt))

    def select(self, scores: Tensor, ctx: LayerContext) -> Kept:
        return self.method.select(scores, ctx)

    def compact(self, k: Tensor, v: Tensor, kept: Kept, ctx: LayerContext) -> tuple[Tensor, Tensor]:
        return self.method.compact(k, v, kept, ctx)

    def scoring_passes(self, num_tokens: int) -> list[ScoringPass]:
        return self.method.scoring_passes(num_tokens)

    def decode_budget(self, num_held: int, num_tokens: int) -> int | None:
        return self.method.decode_budget(num_held, num_tokens)


METHODS: dict[str, type[ScoringMethod]] = {}
"""Every method that has been defined, by its name."""

WRAPPERS: dict[str, type[Wrapper]] = {}
"""Every wrapper that has been defined, by its name."""

_Kind = TypeVar("_Kind", bound=Method)


def _register(kind: type[_Kind], registry: dict[str, type[_Kind]], others: Mapping[str, type[Method]]) -> None:
    """Enter a class that has a name of its own; one that is defined again (in a notebook) replaces the one before."""
    name = kind.__dict__.get("name")
    if name is None:
        return
    if not isinstance(name, str) or re.fullmatch(r"\w+", name) is None:
        raise TypeError(f"{kind.__name__}: name is {name!r}, expected letters, digits and _")
    earlier = registry.get(name) or others.get(name)
    if earlier is not None and (earlier.__module__, earlier.__qualname__) != (kind.__module__, kind.__qualname__):
        raise TypeError(f"{kind.__name__}: name is {name!r}, as that of {earlier.__qualname__}; expected another")
    registry[name] = kind


def keep_best(scores: Tensor, ctx: LayerContext, scope: str) -> Kept:
    """The tokens of the highest ``scores [B, G, N]``, as many as ``ctx.budgets`` say.

    That is their number in every head ("head"), or on average over the heads of a sequence, which compete ("layer").
    Without padding nothing is read back from the device.
    """
    if scope == "head" and ctx.bounds is None:
        return Kept(ops.select(scores, ctx.budget)[0])
    if ctx.bounds is None:
        rows, counts = ops.select(scores, ctx.budget, scope="layer")
        return _packed([rows], [counts])
    chosen = [
        ops.select(scores[b : b + 1], budget, scope="layer" if scope == "layer" else "head")
        for b, budget in enumerate(ctx.budgets)
    ]
    return _packed([rows for rows, _ in chosen], [counts for _, counts in chosen])


def _packed(rows: list[Tensor], counts: list[Tensor]) -> Kept:
    lengths = torch.cat([c.flatten() for c in counts])
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    return Kept(torch.cat([r.flatten() for r in rows]), offsets)


def share_of(num_tokens: int, keep: float | None, budget: int | None) -> int:
    """How many of ``num_tokens`` a share ``keep`` or a number ``budget`` leaves: rounded up, at least one if any."""
    if budget is not None:
        return min(budget, num_tokens)
    assert keep is not None
    return min(num_tokens, max(1, math.ceil(keep * num_tokens - 1e-9)))


def layer_budgets(method: Method, index: int, num_layers: int, totals: Sequence[int]) -> tuple[int, ...]:
    """Tokens per head that ``method`` keeps of sequences of ``totals`` tokens in layer ``index`` of ``num_layers``.

    A sequence that is no longer than what the method always keeps stays whole.

    Raises:
        ValueError: the share or budget asks for fewer tokens than the method always keeps.
    """
    protected, budgets = method.protected, []
    for total in totals:
        budget = method.num_kept(total, index, num_layers)
        if total > protected > budget and method.traits.bounded:
            raise ValueError(
                f"{method!r}: {budget} of {total} tokens in layer {index}, fewer than the {protected} that it "
                f"always keeps; expected a share of at least {protected / total:.3f}, or a smaller window"
            )
        budgets.append(total if total <= protected else budget)
    return tuple(budgets)


def check_share(name: str, value: float) -> None:
    """``value`` must be a number in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}, expected a number in (0, 1]")
    if not 0 < value <= 1:
        raise ValueError(f"{name} is {value}, expected a share in (0, 1]")


def check_count(name: str, value: int, *, minimum: int) -> None:
    """``value`` must be an int of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}, expected an int >= {minimum}")
    if value < minimum:
        raise ValueError(f"{name} is {value}, expected an int >= {minimum}")
