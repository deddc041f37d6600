"""`attention_pool`: attention of one query per head over the tokens of a window, and its gradients.

Specification: condense_core/ops/reference/attention_pool.py. Kernels: kernels/attention_pool.py,
csrc/cpu/kernels/attention_pool.h, csrc/cuda/attention_pool.cu.

Specification of the gradients: condense_core/ops/reference/attention_pool_backward.py. Kernels:
kernels/attention_pool_backward.py, csrc/cpu/kernels/attention_pool_backward.h.

Offsets of a pack decide how many rows come out, so they are read on the host. On the CPU this costs nothing; on a
device each call waits for it once. Backends get them checked, as int64 on the CPU. While a CUDA graph is captured only
packs that need no offsets are possible: one sequence, or sequences of one length.
"""

from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from condense_core.ops import checks
from condense_core.ops.arguments import AttentionPoolArgs, AttentionPoolBackwardArgs
from condense_core.ops.library import define, differentiate

Args = TypeVar("Args", AttentionPoolArgs, AttentionPoolBackwardArgs)


def attention_pool(
    x: Tensor,
    q: Tensor,
    *,
    ratio: int,
    cu_seqlens: Tensor | None = None,
    halo: int = 0,
    heads: int | None = None,
    scale: float | None = None,
    norm_weight: Tensor | None = None,
    window_bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Pool every window of `ratio` tokens into one row, by attention of one query per head over the window.

    Window j of a sequence covers its tokens `[j*ratio - halo, (j+1)*ratio + halo)`, clipped to the sequence; the last
    window may be short. With `r = x / sqrt(mean(x^2) + eps) * norm_weight` over the whole width, and head h owning its
    own d/heads columns r_h,

        out[j, h] = sum_i p[j, h, i] r_h[i], where p[j, h] = softmax_i(scale * <q[j, h], r_h[i]> + window_bias[h, i])

    `q = 0` without a bias is exactly mean pooling. Differentiable with respect to x, q, norm_weight and window_bias.

    Args:
        x: `[T, d]` float32, bfloat16 or float16: hidden states of S sequences, packed without padding.
        q: `[heads, d/heads]`, one query for all windows, or `[K, heads, d/heads]`, one each; on x's device.
        ratio: tokens per window, >= 1.
        cu_seqlens: `[S+1]` int32 or int64, ascending from 0 to T, on any device; None for a single sequence.
        halo: tokens that a window also sees on either side, >= 0.
        heads: None, or the number of heads that q must have.
        scale: factor on the logits; None for `1 / sqrt(d/heads)`.
        norm_weight: `[d]`, or None for ones.
        window_bias: `[heads, ratio + 2*halo]`, added to the logits by place in the window, counted from
            `j*ratio - halo` whether or not the sequence reaches there; None for zeros.
        eps: added to the mean square, > 0.

    Returns:
        `[K, d]` in x's dtype, K = sum over sequences of ceil(n_s / ratio); sums are accumulated in float32.
        `window_offsets(cu_seqlens, ratio)` tells which rows belong to which sequence.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    checks.check_hidden_states(x)
    checks.check_queries(q, x, heads, ranks=(2, 3))
    checks.check_int("ratio", ratio, minimum=1)
    checks.check_int("halo", halo, minimum=0)
    checks.check_scale(scale)
    checks.check_norm_weight(norm_weight, x)
    checks.check_window_bias(window_bias, x, q.shape[-2], ratio + 2 * halo)
    checks.check_eps(eps)
    if cu_seqlens is not None:
        checks.check_offset_tensor("cu_seqlens", cu_seqlens)
    elif q.dim() == 3:
        _check_rows(q, [0, len(x)], ratio)
    head_dim = q.shape[-1]
    # A window wider than the pack sees no more than one of its width, and offsets stay within 64 bits.
    width, reach = min(ratio, max(len(x), 1)), min(halo, len(x))
    if window_bias is not None:
        window_bias = window_bias[:, halo - reach : halo + width + reach]
    out, _ = _attention_pool(
        x,
        q,
        width,
        cu_seqlens,
        reach,
        head_dim**-0.5 if scale is None else float(scale),
        norm_weight,
        window_bias,
        float(eps),
    )
    return out


def _check_rows(q: Tensor, ends: list[int], ratio: int) -> None:
    rows = sum(-(-(stop - start) // ratio) for start, stop in pairwise(ends))
    checks.check_num_queries(q, rows, f"the windows of {len(ends) - 1} sequences, {ends[-1]} tokens")


def _check_windows(args: Args) -> Args:
    if args.cu_seqlens is None:
        return args
    cu_seqlens = checks.offsets_on_host("cu_seqlens", args.cu_seqlens, len(args.x))
    if args.q.dim() == 3 and cu_seqlens is not None:
        _check_rows(args.q, cu_seqlens.tolist(), args.ratio)
    return args._replace(cu_seqlens=cu_seqlens)


def _fake(args: AttentionPoolArgs) -> tuple[Tensor, Tensor]:
    x, q = args.x, args.q
    rows: int | torch.SymInt
    if q.dim() == 3:
        rows = q.shape[0]
    elif args.cu_seqlens is None:
        rows = (x.shape[0] + args.ratio - 1) // args.ratio
    else:
        rows = torch.library.get_ctx().new_dynamic_size()
    return x.new_empty(rows, x.shape[1]), x.new_empty(rows, q.shape[-2], dtype=torch.float32)


def _fake_backward(args: AttentionPoolBackwardArgs) -> tuple[Tensor, ...]:
    inputs = (args.x, args.q, args.norm_weight, args.window_bias)
    return tuple(args.grad.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


_attention_pool = define(
    "attention_pool", AttentionPoolArgs, "(Tensor out, Tensor lse)", fake=_fake, check=_check_windows
)
_attention_pool_backward = define(
    "attention_pool_backward",
    AttentionPoolBackwardArgs,
    "(Tensor dx, Tensor dq, Tensor dnorm_weight, Tensor dwindow_bias)",
    fake=_fake_backward,
    check=_check_windows,
)


def _gradients(grad: Tensor, args: AttentionPoolArgs, out: Tensor, lse: Tensor) -> dict[str, Tensor]:
    dx, dq, dw, dbias = _attention_pool_backward(grad, args.x, args.q, out, lse, *args[2:])
    return {"x": dx, "q": dq, "norm_weight": dw, "window_bias": dbias}


differentiate("attention_pool", AttentionPoolArgs, _gradients)
