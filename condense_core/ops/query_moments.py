"""`query_moments`: a normal model of the queries to come.

Specification: condense_core/ops/reference/query_moments.py. Kernels: kernels/query_moments.py,
csrc/cpu/kernels/query_moments.h.
"""

import torch
from torch import Tensor

from condense_core.ops import checks
from condense_core.ops.arguments import QueryMomentsArgs
from condense_core.ops.library import define


def query_moments(
    q: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    sink: int = 4,
    bounds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of each head's queries before their rotary embedding.

    The rotation `q = p * cos + rotate_half(p) * sin` is undone while q is read: `p = (q * cos - rotate_half(q) * sin) /
    (cos^2 + sin^2)`. This is exact also where cos and sin are rounded or carry a factor, as YaRN's do. The covariance
    divides by the number of tokens.

    Kernels round `p`, taken relative to a nearby mean, to q's dtype before they multiply. `cov[i, j]` is exact but for
    `2 u sqrt(cov[i, i] cov[j, j])` at most, u = 2^-9 for bfloat16 and 2^-12 for float16.

    Args:
        q: `[B, H, N, D]` float32, bfloat16 or float16, any strides: the queries of N tokens after RoPE, as attention
            sees them.
        cos: `[B, N, D]` or `[1, N, D]`, a float dtype, as the model's rotary embedding returns it. Its two halves are
            alike and only the first is read. None: q has not been rotated.
        sin: likewise; given exactly when cos is.
        sink: real tokens at the start of each sequence to leave out, because they are outliers; >= 0.
        bounds: `[B, 2]` int32 or int64 on q's device: the tokens start <= i < stop of each sequence are real, both
            clamped to [0, N]; the others are padding. None: all are real.

    Returns:
        `mu [B, H, D]` and `cov [B, H, D, D]`, float32; zeros for a sequence without a real token after the sinks.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Devoto, Jeblick and Jégou, Expected Attention: KV Cache Compression by Estimating Attention from Future Queries
    Distribution, arXiv 2510.00636.
    """
    checks.check_cache("q", q)
    checks.check_rotation("cos", cos, "sin", sin, q.shape[-1])
    for name, tensor in (("cos", cos), ("sin", sin)):
        if tensor is not None:
            checks.check_floats(name, tensor, checks.DTYPES, ("q", q))
            if tensor.dim() != 3 or tensor.shape[0] not in (1, q.shape[0]) or tensor.shape[1:] != q.shape[2:]:
                batch, _, num_tokens, head_dim = q.shape
                expected = f"[B or 1, N, D] = [{batch} or 1, {num_tokens}, {head_dim}]"
                raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {expected}")
    checks.check_int("sink", sink, minimum=0)
    checks.check_bounds(bounds, q)
    mu, cov = _query_moments(q, cos, sin, min(sink, q.shape[2]), bounds)
    return mu, cov


def _fake(args: QueryMomentsArgs) -> tuple[Tensor, Tensor]:
    batch, heads, _, head_dim = args.q.shape
    mu = args.q.new_empty(batch, heads, head_dim, dtype=torch.float32)
    return mu, args.q.new_empty(batch, heads, head_dim, head_dim, dtype=torch.float32)


_query_moments = define("query_moments", QueryMomentsArgs, "(Tensor mu, Tensor cov)", fake=_fake)
