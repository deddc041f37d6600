"""ExpectedAttention: what the queries to come will attend to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from condense_core import ops
from condense_core.pruning.base import LayerContext, ScoringMethod, Traits, check_count


@dataclass(frozen=True, kw_only=True, repr=False)
class ExpectedAttention(ScoringMethod):
    """``score_i = (mean_h softmax_i(l_h) + epsilon) * ||v_i||``, ``l_hi = s k_i' R mu_h + s^2/2 k_i' R S_h R' k_i``.

    Devoto et al., arXiv 2510.00636. ``mu_h`` and ``S_h`` are mean and covariance of the pass's queries before RoPE,
    without those of the sinks; R is the mean rotation of the next ``future`` positions; s is attention's scale; h runs
    over the query heads of the group and i over the tokens after the sinks. In a prefill in chunks the queries are
    those of the last chunk and the keys all that are cached.

    Attributes:
        sink: the first tokens, which are kept, >= 0.
        future: positions to come over which the rotation is averaged, >= 1.
        epsilon: added to the attention before the norm of the value multiplies it, >= 0.
        use_covariance: False leaves the term with S out.
        use_vnorm: False leaves epsilon and the norm of the value out.
    """

    name = "expected_attention"
    summary = "tokens that the queries to come are expected to attend to"
    paper = "2510.00636"
    traits = Traits(reads_rotary=True)
    sink: int = 4
    future: int = 512
    epsilon: float = 0.0
    use_covariance: bool = True
    use_vnorm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("ExpectedAttention: sink", self.sink, minimum=0)
        check_count("ExpectedAttention: future", self.future, minimum=1)
        if isinstance(self.epsilon, bool) or not isinstance(self.epsilon, int | float):
            raise TypeError(f"ExpectedAttention: epsilon is {self.epsilon!r}, expected a number >= 0")
        if not 0 <= self.epsilon < math.inf:
            raise ValueError(f"ExpectedAttention: epsilon is {self.epsilon}, expected a finite number >= 0")

    @property
    def protected(self) -> int:
        return self.sink

    def score(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        mu, cov = self._moments(q, ctx, past=k.shape[2] - q.shape[2])
        if ctx.bounds is None and ctx.positions is None:
            return self._expected(k, v, mu, cov, ctx.bounds, ctx.lengths[0], ctx)
        # Sequences that end at different positions expect different rotations.
        scores = []
        for b in range(k.shape[0]):
            part = slice(b, b + 1)
            bounds = None if ctx.bounds is None else ctx.bounds[part]
            first = _next_position(b, k, ctx)
            scores.append(self._expected(k[part], v[part], mu[part], cov[part], bounds, first, ctx))
        return torch.cat(scores)

    def _expected(
        self,
        k: Tensor,
        v: Tensor,
        mu: Tensor,
        cov: Tensor,
        bounds: Tensor | None,
        first: Tensor | int,
        ctx: LayerContext,
    ) -> Tensor:
        """The scores of sequences whose next position is ``first``."""
        cos, sin = self._mean_rotation(first, k.device, ctx) if ctx.rotary.turns else (None, None)
        return ops.expected_attention(
            ctx.rotary.to_halves(k),
            v if self.use_vnorm else None,
            mu,
            cov if self.use_covariance else None,
            mean_cos=cos,
            mean_sin=sin,
            scale=ctx.scale,
            sink=self.sink,
            epsilon=self.epsilon,
            bounds=bounds,
        )

    def _moments(self, q: Tensor, ctx: LayerContext, past: int) -> tuple[Tensor, Tensor]:
        # The op pairs channels as halves; products of queries and keys do not depend on the order of their channels.
        q = ctx.rotary.to_halves(q)
        cos, sin = (ctx.cos, ctx.sin) if ctx.rotary.turns else (None, None)
        if ctx.bounds is None:
            return ops.query_moments(q, cos, sin, sink=max(self.sink - past, 0))
        # A sequence may begin in any chunk: its sinks are counted from there.
        start, stop = ctx.bounds.unbind(1)
        bounds = torch.stack([start + self.sink, stop], dim=1) - past
        return ops.query_moments(q, cos, sin, sink=0, bounds=bounds)

    def _mean_rotation(self, first: Tensor | int, device: torch.device, ctx: LayerContext) -> tuple[Tensor, Tensor]:
        """Mean cos and sin ``[D]`` of the ``future`` positions from ``first`` on."""
        key = (type(self), ctx.rotary, first, self.future, device)
        if isinstance(first, int) and key in ctx.memo:
            return ctx.memo[key]  # the same in every layer that has this rotary embedding
        cos, sin = ctx.rotary.half_table(torch.arange(self.future, device=device) + first)
        means = cos.mean(dim=0), sin.mean(dim=0)
        if isinstance(first, int):
            ctx.memo[key] = means
        return means


def _next_position(b: int, k: Tensor, ctx: LayerContext) -> Tensor | int:
    """The position behind the last token of sequence b, where possible without a tensor."""
    if ctx.positions is None:
        return ctx.lengths[b]
    if ctx.bounds is None:
        return ctx.positions[b, 0, -1] + 1
    # All heads hold the tokens of this pass, so the last one too.
    return ctx.positions[b, 0].gather(0, (ctx.bounds[b, 1:] - 1).clamp(min=0)) + 1
