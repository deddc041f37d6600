"""KVzap: what KVzip would keep, guessed from the hidden states, without reading the context again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from condense_core.pruning.base import LayerContext, Traits, check_count
from condense_core.pruning.methods.common import join_previous
from condense_core.pruning.methods.fitted import FittedMethod
from condense_core.pruning.prompt import Prompt

LEAST = 1e-5
"""Added to KVzip's scores, shares of attention, before their logarithm is fitted."""


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class KVzap(FittedMethod):
    """``score_i = exp(<w, x_i / rms(x_i)> + b)``, x the layer's input, w and b of the layer and KV head.

    Jegou and Jeblick, arXiv 2601.07891: KVzip asks the model to repeat the context, a second prefill, and keeps what
    that looks at. A linear model of the hidden states foretells the logarithm of those scores, and costs one small
    matrix product in a layer. Here it is fitted in closed form (``surrogate.fit``, a ridge regression on some texts)
    where the authors train by gradient, and the budget is met where they keep all above a threshold, which
    ``Threshold(KVzap(...))`` does. ``AcrossLayers`` lets the heads of all layers compete, as they do in KVzip.

    Where a text is read (``text.prefill``), what the chat template writes before it stays.

    Attributes:
        surrogate: ``[L, G, d_model + 1]`` for L layers and G KV heads, w and behind it b, a float tensor or the path of
            a safetensors file that holds one, as ``condense calibrate`` writes it. It must not be changed afterwards.
        sink: the first tokens, which are kept, >= 0.
    """

    name = "kvzap"
    summary = "tokens that KVzip would keep, foretold from hidden states by a fit made once for a model"
    paper = "2601.07891"
    traits = Traits(uses_previous=True, prefills_only=True, any_budget=True)
    needs = "surrogate"
    axes = "[L, G, d_model + 1]"
    maker = "condense calibrate"
    surrogate: Tensor | str | Path | None = None
    sink: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("KVzap: sink", self.sink, minimum=0)

    @property
    def protected(self) -> int:
        return self.sink

    def for_prompt(self, prompt: Prompt) -> KVzap:
        return replace(self, sink=max(self.sink, prompt.text_start))

    def score(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        expected = (ctx.num_layers, k.shape[1], ctx.hidden.shape[-1] + 1)
        if self.fitted.shape != expected:
            raise ValueError(
                f"KVzap: surrogate has shape {list(self.fitted.shape)}, expected {self.axes} = {list(expected)} for "
                "this model"
            )
        weights = self.fitted[ctx.layer_idx].to(device=k.device, dtype=torch.float32)
        fresh = (normed(ctx.hidden) @ weights[:, :-1].mT + weights[:, -1]).exp().mT
        return ctx.protect(join_previous("KVzap", fresh, ctx, k.shape[2]).contiguous(), sink=self.sink)


def normed(hidden: Tensor) -> Tensor:
    """``x / rms(x)`` in float32."""
    return F.rms_norm(hidden.float(), hidden.shape[-1:])


class SurrogateFit:
    """Ridge regression of ``log(score + LEAST)`` on normed hidden states, from sums that grow text by text.

    Some tens of thousands of tokens are enough for a model of a few hundred channels.
    """

    def __init__(self) -> None:
        self._squares: list[Tensor] = []
        self._products: list[Tensor] = []
        self.num_tokens = 0

    def add(self, inputs: Sequence[Tensor], scores: Sequence[Tensor]) -> None:
        """Another text.

        Args:
            inputs: of each layer, ``[T, d_model]``.
            scores: of each layer, ``[G, T]``, KVzip's, in [0, 1].
        """
        squares, products = [], []
        for hidden, found in zip(inputs, scores, strict=True):
            if not bool(found.isfinite().all()):
                raise ValueError("scores: not all finite; expected shares of attention, protected tokens left out")
            x = F.pad(normed(hidden), (0, 1), value=1.0).double()
            squares.append(x.mT @ x)
            products.append(x.mT @ (found.float() + LEAST).log().double().mT)
        if not self.num_tokens:
            self._squares, self._products = squares, products
        else:
            self._squares = [a + b for a, b in zip(self._squares, squares, strict=True)]
            self._products = [a + b for a, b in zip(self._products, products, strict=True)]
        self.num_tokens += inputs[0].shape[0]

    def solve(self, ridge: float = 1e-3) -> Tensor:
        """``[L, G, d_model + 1]`` float32 on the CPU. ridge: per token, as hidden states have a square of 1 a channel.

        ``ValueError`` where there was no token.
        """
        if not self.num_tokens:
            raise ValueError("texts: no token was added, expected some thousands")
        rows = []
        for squares, products in zip(self._squares, self._products, strict=True):
            penalty = torch.full_like(squares[0], ridge * self.num_tokens)
            penalty[-1] = 0  # of the offset
            rows.append(torch.linalg.solve(squares + penalty.diag(), products).mT)
        return torch.stack(rows).float().cpu()
