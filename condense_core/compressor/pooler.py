"""From hidden states of n tokens to k soft tokens: the heads of the trained methods.

All share the projection (RMSNorm and a two-layer MLP on the k rows, residual, then the scale of real embeddings) and
differ in how the k rows come about, so that a comparison between them is about just that.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condense_core import ops
from condense_core.compressor.config import CompressorConfig, num_kept


class Projection(nn.Module):
    """``y = x + MLP(rms(x))`` on ``[K, d]``, rescaled to ``embed_norm``; starts as the rescaling alone."""

    embed_norm: Tensor

    def __init__(self, d_model: int, hidden: int, embed_norm: float) -> None:
        super().__init__()
        self.norm_weight = nn.Parameter(torch.ones(d_model))
        self.up = nn.Linear(d_model, hidden) if hidden else None
        self.down = nn.Linear(hidden, d_model) if hidden else None
        if self.down is not None:
            nn.init.zeros_(self.down.weight)
            nn.init.zeros_(self.down.bias)
        self.log_gain = nn.Parameter(torch.zeros(()))
        self.register_buffer("embed_norm", torch.tensor(float(embed_norm)))

    def forward(self, x: Tensor) -> Tensor:
        if self.up is not None and self.down is not None:
            x = x + self.down(F.silu(self.up(F.rms_norm(x, x.shape[-1:], self.norm_weight.to(x.dtype), 1e-6))))
        direction = F.normalize(x.float(), dim=-1)
        return (direction * self.embed_norm * self.log_gain.exp()).to(x.dtype)


class ResidualProjection(nn.Module):
    """``y = base * s + gain * MLP(rms(x))`` on ``[K, d]``, where s is the sum of a window's embeddings over sqrt(n).

    A sum of n embeddings over sqrt(n) has about the norm of one of them, and of one token it is its embedding. The last
    layer of the MLP starts at zero and ``gain`` at the norm of an embedding, so that an untrained compressor of ratio 1
    returns the embeddings, bit for bit, and learning begins where the decoder can read (the identity start of
    LatentPress, arXiv 2609.01507). Neither gain is bounded.
    """

    def __init__(self, d_model: int, hidden: int, embed_norm: float) -> None:
        super().__init__()
        self.norm_weight = nn.Parameter(torch.ones(d_model))
        self.up, self.down = nn.Linear(d_model, hidden), nn.Linear(hidden, d_model)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        self.base = nn.Parameter(torch.ones(()))
        self.gain = nn.Parameter(torch.tensor(float(embed_norm) / d_model**0.5))

    def forward(self, x: Tensor, embeds: Tensor, lengths: Tensor) -> Tensor:
        """Soft tokens ``[K, d]``.

        Args:
            x: pooled hidden states ``[K, d]``.
            embeds: of the tokens ``[T, d]``, window behind window. lengths: int64 ``[K]``, tokens of each window.
        """
        normed = F.rms_norm(x, x.shape[-1:], self.norm_weight.to(x.dtype), 1e-6)
        learned = self.down(F.silu(self.up(normed)))
        return self.base * window_sums(embeds, lengths) * lengths[:, None].float().rsqrt() + self.gain * learned.float()


def window_sums(x: Tensor, lengths: Tensor) -> Tensor:
    """Sums ``[K, d]``, fp32, of K windows of ``lengths [K]`` consecutive rows of ``x [T, d]``; no gradient to x."""
    return torch.segment_reduce(x.detach().float(), "sum", lengths=lengths, axis=0, unsafe=True)


class WindowPooler(nn.Module):
    """The ``pool`` and ``mean`` heads: one row per window of ``ratio`` tokens.

    ``pool`` attends inside the window: static queries, optional queries from the window mean, and a learned bias per
    head and place in the window (per trained ratio). All start at zero, where attention is exactly the mean. ``mean``
    has none.
    """

    def __init__(self, config: CompressorConfig) -> None:
        super().__init__()
        self.config = config
        heads, head_dim = config.num_heads, config.d_model // config.num_heads
        learned = config.method in ("pool", "mixed")
        windows = (config.window,) if config.window else config.ratios
        self.norm_weight = nn.Parameter(torch.ones(config.d_model))
        self.query = nn.Parameter(torch.zeros(heads, head_dim), requires_grad=learned)
        self.query_proj = nn.Linear(config.d_model, config.d_model, bias=False) if config.window_queries else None
        if self.query_proj is not None:
            nn.init.zeros_(self.query_proj.weight)
        self.window_bias = nn.ParameterDict(
            {str(r): nn.Parameter(torch.zeros(heads, int(r) + 2 * config.halo)) for r in windows if learned}
        )

    @torch.no_grad()
    def start_ordered(self, groups: int = 4, strength: float = 0.7) -> None:
        """Let head h prefer quarter ``h mod groups`` of its window, so that order survives pooling from the first step.

        The mean forgets the order of its tokens; heads that look at different places keep it. A starting point for
        training only.
        """
        for name, bias in self.window_bias.items():
            ratio = int(name)
            parts = min(groups, ratio)
            place = torch.arange(ratio) * parts // ratio
            preferred = torch.arange(bias.shape[0])[:, None] % parts == place
            bias[:, self.config.halo : self.config.halo + ratio] = preferred.float() * strength

    def forward(self, x: Tensor, cu_seqlens: Tensor | None, ratio: int) -> Tensor:
        pool = partial(ops.attention_pool, x, ratio=ratio, cu_seqlens=cu_seqlens, norm_weight=self.norm_weight)
        if self.config.method == "mean":
            return pool(self.query)
        query = self.query
        if self.query_proj is not None:
            mean = pool(torch.zeros_like(query))
            query = query + self.query_proj(mean).unflatten(-1, query.shape)
        return pool(query, halo=self.config.halo, window_bias=self.window_bias.get(str(ratio)))


class TokenScorer(nn.Module):
    """Which tokens ``mixed`` keeps exact: a score for each, ``[T]``, from hidden states ``[T, d]``; larger is kept.

    Sentences are kept as a whole, by the mean score of their tokens. Trained to tell the statements that questions will
    be about from the text around them, as the logit of a token being part of one.
    """

    def __init__(self, d_model: int, hidden: int = 128) -> None:
        super().__init__()
        self.norm_weight = nn.Parameter(torch.ones(d_model))
        self.up, self.down = nn.Linear(d_model, hidden), nn.Linear(hidden, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = F.rms_norm(hidden, hidden.shape[-1:], self.norm_weight.to(hidden.dtype), 1e-6)
        scores: Tensor = self.down(F.silu(self.up(normed))).squeeze(-1).float()
        return scores


class MemoryTokens(nn.Module):
    """The ``memory`` head (ICAE, arXiv 2307.06945): learned slots appended to each segment, read behind the layers."""

    def __init__(self, config: CompressorConfig, embed_norm: float) -> None:
        super().__init__()
        slots = num_kept(config.segment_tokens, min(config.ratios, default=1))
        noise = torch.randn(slots, config.d_model) * embed_norm / config.d_model**0.5
        self.embeds = nn.Parameter(noise)
        self.norm_weight = nn.Parameter(torch.ones(config.d_model))

    def append(self, x: Tensor, cu_seqlens: list[int], ratio: int) -> tuple[Tensor, list[int], Tensor]:
        """Each sequence followed by its ceil(n / ratio) slots: embeddings, their offsets, the slots' row indices."""
        parts, ends, rows = [], [0], []
        for start, stop in pairwise(cu_seqlens):
            k = -(-(stop - start) // ratio)
            # Slots are spread over the table, so that a slot means about the same place in a segment at every ratio.
            chosen = torch.arange(k, device=x.device) * len(self.embeds) // max(k, 1)
            parts += [x[start:stop], self.embeds[chosen].to(x.dtype)]
            rows.append(torch.arange(k, device=x.device) + ends[-1] + stop - start)
            ends.append(ends[-1] + stop - start + k)
        return torch.cat(parts), ends, torch.cat(rows)

    def read(self, hidden: Tensor, rows: Tensor) -> Tensor:
        picked = hidden[rows]
        return F.rms_norm(picked, picked.shape[-1:], self.norm_weight.to(picked.dtype), 1e-6)
