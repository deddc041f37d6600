"""Pooling hidden states into rows: the public functions, and their registration with gradients.

Offsets of a pack decide how many rows come out, so they are read on the host. On the CPU they cost nothing; on a device
each call waits for it once. Backends get them checked, as int64 on the CPU. While a CUDA graph is captured only packs
that need no offsets are possible: one sequence or, for attention_pool, sequences of one length.
"""

from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from condense_core.ops import checks
from condense_core.ops.arguments import (
    AttentionPoolArgs,
    AttentionPoolBackwardArgs,
    CrossPoolArgs,
    CrossPoolBackwardArgs,
)
from condense_core.ops.library import NAMESPACE, define
from condense_core.ops.reference import window_offsets as _window_offsets


def num_windows(num_tokens: int, ratio: int) -> int:
    """Windows, and so soft tokens, that `num_tokens` tokens make at `ratio`: ceil(num_tokens / ratio).

    Raises:
        TypeError, ValueError: `num_tokens` is not an int >= 0, or `ratio` not an int >= 1.
    """
    checks.check_int("num_tokens", num_tokens, minimum=0)
    checks.check_int("ratio", ratio, minimum=1)
    return -(-num_tokens // ratio)


def window_offsets(cu_seqlens: Tensor, ratio: int) -> Tensor:
    """Where the rows of each sequence stand in the output of `attention_pool`.

    Args:
        cu_seqlens: `[S+1]` int32 or int64, offsets of the packed sequences in tokens, ascending from 0.
        ratio: tokens per window, >= 1.

    Returns:
        `[S+1]` offsets in rows, of cu_seqlens' dtype and device: the rows of sequence s are
        `out[offsets[s]:offsets[s + 1]]`, none for an empty one, and `offsets[-1]` is K.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    checks.check_int("ratio", ratio, minimum=1)
    num_tokens = checks.check_offsets("cu_seqlens", cu_seqlens)[-1]
    return _window_offsets(cu_seqlens, min(ratio, max(num_tokens, 1)))


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

    Window j of a sequence covers its tokens `[j*ratio - halo, (j+1)*ratio + halo)`, clipped to the sequence;
    the last window may be short. With `r = x / sqrt(mean(x^2) + eps) * norm_weight` over the whole width, and
    head h owning its own d/heads columns r_h, `out[j, h] = sum_i p[j, h, i] r_h[i]`, where
    `p[j, h] = softmax_i(scale * <q[j, h], r_h[i]> + window_bias[h, i])`. `q = 0` without a bias is exactly
    mean pooling. Differentiable with respect to x, q, norm_weight and window_bias.

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
    # A window wider than the pack sees no more than one of its width; offsets stay within 64 bits whatever is asked
    # for.
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


def cross_pool(
    x: Tensor,
    q: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    cu_queries: Tensor | None = None,
    heads: int | None = None,
    scale: float | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Let every query attend over all tokens of its sequence, earlier and later: k queries in, k rows out.

    The queries of sequence s are `q[cu_queries[s]:cu_queries[s + 1]]`. With r and r_h as in `attention_pool`:
    `out[j, h] = sum_i p[j, h, i] r_h[i]`, where `p[j, h] = softmax_i(scale * <q[j, h], r_h[i]>)` over the
    tokens i of that sequence. Differentiable with respect to x, q and norm_weight.

    Args:
        x: `[T, d]` float32, bfloat16 or float16: hidden states of S sequences, packed without padding.
        q: `[K, heads, d/heads]`, on x's device.
        cu_seqlens: `[S+1]` int32 or int64, ascending from 0 to T, on any device; None for a single sequence.
        cu_queries: `[S+1]` likewise, ascending from 0 to K; None for a single sequence.
        heads: None, or the number of heads that q must have.
        scale: factor on the logits; None for `1 / sqrt(d/heads)`.
        norm_weight: `[d]`, or None for ones.
        eps: added to the mean square, > 0.

    Returns:
        `[K, d]` in x's dtype; zeros where the sequence of a query is empty. Sums are accumulated in float32.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    checks.check_hidden_states(x)
    checks.check_queries(q, x, heads, ranks=(3,))
    checks.check_scale(scale)
    checks.check_norm_weight(norm_weight, x)
    checks.check_eps(eps)
    if cu_seqlens is not None:
        checks.check_offset_tensor("cu_seqlens", cu_seqlens)
    if cu_queries is not None:
        checks.check_offset_tensor("cu_queries", cu_queries)
    given, expected = (1 if offsets is None else len(offsets) - 1 for offsets in (cu_queries, cu_seqlens))
    if given != expected:
        came = "None" if cu_queries is None else f"{given} sequences"
        raise ValueError(f"cu_queries is {came}, expected {expected} sequences, as in cu_seqlens")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    out, _ = _cross_pool(x, q, cu_seqlens, cu_queries, scale, norm_weight, float(eps))
    return out


def _check_rows(q: Tensor, ends: list[int], ratio: int) -> None:
    rows = sum(-(-(stop - start) // ratio) for start, stop in pairwise(ends))
    checks.check_num_queries(q, rows, f"the windows of {len(ends) - 1} sequences, {ends[-1]} tokens")


def _checked(name: str, offsets: Tensor | None, end: int) -> Tensor | None:
    """Offsets whose values are right, as backends take them."""
    return None if offsets is None else torch.tensor(checks.check_offsets(name, offsets, end))


_Windows = TypeVar("_Windows", AttentionPoolArgs, AttentionPoolBackwardArgs)
_Sequences = TypeVar("_Sequences", CrossPoolArgs, CrossPoolBackwardArgs)


def _check_windows(args: _Windows) -> _Windows:
    cu_seqlens = _checked("cu_seqlens", args.cu_seqlens, len(args.x))
    if args.q.dim() == 3 and cu_seqlens is not None:
        _check_rows(args.q, cu_seqlens.tolist(), args.ratio)
    return args._replace(cu_seqlens=cu_seqlens)


def _check_sequences(args: _Sequences) -> _Sequences:
    return args._replace(
        cu_seqlens=_checked("cu_seqlens", args.cu_seqlens, len(args.x)),
        cu_queries=_checked("cu_queries", args.cu_queries, len(args.q)),
    )


def _fake_attention_pool(args: AttentionPoolArgs) -> tuple[Tensor, Tensor]:
    x, q = args.x, args.q
    rows: int | torch.SymInt
    if q.dim() == 3:
        rows = q.shape[0]
    elif args.cu_seqlens is None:
        rows = (x.shape[0] + args.ratio - 1) // args.ratio
    else:
        rows = torch.library.get_ctx().new_dynamic_size()
    return x.new_empty(rows, x.shape[1]), x.new_empty(rows, q.shape[-2], dtype=torch.float32)


def _fake_cross_pool(args: CrossPoolArgs) -> tuple[Tensor, Tensor]:
    rows, heads, _ = args.q.shape
    return args.x.new_empty(rows, args.x.shape[1]), args.x.new_empty(rows, heads, dtype=torch.float32)


def _fake_attention_pool_backward(args: AttentionPoolBackwardArgs) -> tuple[Tensor, ...]:
    return _like(args.grad, args.x, args.q, args.norm_weight, args.window_bias)


def _fake_cross_pool_backward(args: CrossPoolBackwardArgs) -> tuple[Tensor, ...]:
    return _like(args.grad, args.x, args.q, args.norm_weight)


def _like(grad: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients of the tensors; an empty one for None."""
    return tuple(grad.new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors)


_attention_pool = define(
    "attention_pool",
    AttentionPoolArgs,
    "(Tensor out, Tensor lse)",
    fake=_fake_attention_pool,
    check=_check_windows,
)
_attention_pool_backward = define(
    "attention_pool_backward",
    AttentionPoolBackwardArgs,
    "(Tensor dx, Tensor dq, Tensor dnorm_weight, Tensor dwindow_bias)",
    fake=_fake_attention_pool_backward,
    check=_check_windows,
)
_cross_pool = define(
    "cross_pool", CrossPoolArgs, "(Tensor out, Tensor lse)", fake=_fake_cross_pool, check=_check_sequences
)
_cross_pool_backward = define(
    "cross_pool_backward",
    CrossPoolBackwardArgs,
    "(Tensor dx, Tensor dq, Tensor dnorm_weight)",
    fake=_fake_cross_pool_backward,
    check=_check_sequences,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Tensors are saved as such, the numbers between them as they stand."""
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)), *output)
    ctx.arguments = [None if isinstance(value, Tensor) else (value,) for value in inputs]
    ctx.set_materialize_grads(False)


def _saved(ctx: Any) -> tuple[list[Any], Tensor, Tensor]:
    """The inputs in their order, and both outputs."""
    *tensors, out, lse = ctx.saved_tensors
    saved = iter(tensors)
    return [next(saved) if number is None else number[0] for number in ctx.arguments], out, lse


def _differentiate_attention_pool(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * len(AttentionPoolArgs._fields)
    inputs, out, lse = _saved(ctx)
    args = AttentionPoolArgs(*inputs)
    dx, dq, dw, dbias = _attention_pool_backward(grad, args.x, args.q, out, lse, *args[2:])
    if args.norm_weight is None:
        dw = None
    if args.window_bias is None:
        dbias = None
    grads = {"x": dx, "q": dq, "norm_weight": dw, "window_bias": dbias}
    return tuple(grads.get(name) for name in AttentionPoolArgs._fields)


def _differentiate_cross_pool(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * len(CrossPoolArgs._fields)
    inputs, out, lse = _saved(ctx)
    args = CrossPoolArgs(*inputs)
    dx, dq, dw = _cross_pool_backward(grad, args.x, args.q, out, lse, *args[2:])
    grads = {"x": dx, "q": dq, "norm_weight": None if args.norm_weight is None else dw}
    return tuple(grads.get(name) for name in CrossPoolArgs._fields)


torch.library.register_autograd(
    f"{NAMESPACE}::attention_pool", _differentiate_attention_pool, setup_context=_setup_context
)
torch.library.register_autograd(f"{NAMESPACE}::cross_pool", _differentiate_cross_pool, setup_context=_setup_context)
