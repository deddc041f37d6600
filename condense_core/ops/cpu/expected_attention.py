"""Expected attention on the CPU. Moments go to the kernels in fp32."""

import torch
from torch import Tensor

from condense_core.ops import native


def query_moments(
    q: Tensor, cos: Tensor | None, sin: Tensor | None, sink: int, bounds: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Mean `[B, H, D]` and covariance `[B, H, D, D]`; the kernel is csrc/cpu/kernels/query_moments.h."""
    batch, heads, _, head_dim = q.shape
    mu, cov = torch.empty(batch, heads, head_dim), torch.empty(batch, heads, head_dim, head_dim)
    if cos is not None and sin is not None:
        if cos.dtype != sin.dtype:
            cos, sin = cos.float(), sin.float()
        cos, sin = native.rows_contiguous(cos), native.rows_contiguous(sin)
    native.call("query_moments", native.rows_contiguous(q), cos, sin, sink, bounds, mu, cov)
    return mu, cov


def expected_attention(
    k: Tensor,
    v: Tensor | None,
    mu: Tensor,
    cov: Tensor | None,
    mean_cos: Tensor | None,
    mean_sin: Tensor | None,
    scale: float,
    epsilon: float,
    sink: int,
    bounds: Tensor | None,
) -> Tensor:
    """Scores `[B, G, N]`; the kernel is csrc/cpu/kernels/expected_attention.h."""
    out = torch.empty(k.shape[:3])
    rows = native.rows_contiguous(k), None if v is None else native.rows_contiguous(v)
    moments = mu.contiguous(), None if cov is None else cov.contiguous()
    rotation = (None if t is None else t.float().contiguous() for t in (mean_cos, mean_sin))
    native.call("expected_attention", *rows, *moments, *rotation, scale, epsilon, sink, bounds, out)
    return out
