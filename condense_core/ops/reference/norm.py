"""The RMS norm in front of both poolings, and its gradient."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension: `[T, d] -> [T, d]` in x's dtype."""
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return normed if weight is None else normed * weight.to(x.dtype)


def rms_norm_backward(dr: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight (empty if None) for `r = rms_norm(x)`, dr `[T, d]` in fp32."""
    rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    normed = x.float() * rstd
    da = dr if weight is None else dr * weight.float()
    dx = rstd * (da - normed * (da * normed).mean(-1, keepdim=True))
    dw = dr.new_empty(0) if weight is None else (dr * normed).sum(0).to(weight.dtype)
    return dx.to(x.dtype), dw
