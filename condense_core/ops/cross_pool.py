"""`cross_pool`: attention of every query over all tokens of its sequence, and its gradients.

Specification: condense_core/ops/reference/cross_pool.py. Kernels: kernels/cross_pool.py, csrc/cpu/kernels/cross_pool.h.

Specification of the gradients: condense_core/ops/reference/cross_pool_backward.py. Kernel:
kernels/cross_pool_backward.py.

Offsets of a pack decide how many rows come out, so they are read on the host. On the CPU this costs nothing; on a
device each call waits for it once. Backends get them checked, as int64 on the CPU.
"""

from typing import TypeVar

import torch
from torch import Tensor

from condense_core.ops import checks
from condense_core.ops.arguments import CrossPoolArgs, CrossPoolBackwardArgs
from condense_core.ops.library import define, differentiate

Args = TypeVar("Args", CrossPoolArgs, CrossPoolBackwardArgs)


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

    The queries of sequence s are `q[cu_queries[s]:cu_queries[s + 1]]`. With r and r_h as in `attention_pool`,

        out[j, h] = sum_i p[j, h, i] r_h[i], where p[j, h] = softmax_i(scale * <q[j, h], r_h[i]>)

    over the tokens i of that sequence. Differentiable with respect to x, q and norm_weight.

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


def _check_sequences(args: Args) -> Args:
    if args.cu_seqlens is None and args.cu_queries is None:
        return args
    return args._replace(
        cu_seqlens=checks.offsets_on_host("cu_seqlens", args.cu_seqlens, len(args.x)),
        cu_queries=checks.offsets_on_host("cu_queries", args.cu_queries, len(args.q)),
    )


def _fake(args: CrossPoolArgs) -> tuple[Tensor, Tensor]:
    rows, heads, _ = args.q.shape
    return args.x.new_empty(rows, args.x.shape[1]), args.x.new_empty(rows, heads, dtype=torch.float32)


def _fake_backward(args: CrossPoolBackwardArgs) -> tuple[Tensor, ...]:
    inputs = (args.x, args.q, args.norm_weight)
    return tuple(args.grad.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


_cross_pool = define("cross_pool", CrossPoolArgs, "(Tensor out, Tensor lse)", fake=_fake, check=_check_sequences)
_cross_pool_backward = define(
    "cross_pool_backward",
    CrossPoolBackwardArgs,
    "(Tensor dx, Tensor dq, Tensor dnorm_weight)",
    fake=_fake_backward,
    check=_check_sequences,
)


def _gradients(grad: Tensor, args: CrossPoolArgs, out: Tensor, lse: Tensor) -> dict[str, Tensor]:
    dx, dq, dw = _cross_pool_backward(grad, args.x, args.q, out, lse, *args[2:])
    return {"x": dx, "q": dq, "norm_weight": dw}


differentiate("cross_pool", CrossPoolArgs, _gradients)
