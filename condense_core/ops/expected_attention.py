"""Expected attention, the public functions: moments of the queries, and scores of the keys under them."""

import math
from numbers import Real

import torch
from torch import Tensor

from condense_core.ops import checks
from condense_core.ops.arguments import ExpectedAttentionArgs, QueryMomentsArgs
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

    The rotation `q = p * cos + rotate_half(p) * sin` is undone while q is read, exactly also where cos and sin are
    rounded or carry a factor, as YaRN's do: `p = (q * cos - rotate_half(q) * sin) / (cos^2 + sin^2)`. The covariance
    divides by the number of tokens. Kernels round `p`, taken relative to a nearby mean, to q's dtype before they
    multiply: `cov[i, j]` is exact but for `2 u sqrt(cov[i, i] cov[j, j])` at most, u = 2^-9 for bfloat16 and 2^-12 for
    float16.

    Args:
        q: `[B, H, N, D]` float32, bfloat16 or float16, any strides: the queries of N tokens as attention sees them,
        after RoPE. cos: `[B, N, D]` or `[1, N, D]`, a float dtype, as the model's rotary embedding returns it, its two
        halves alike; only
            the first is read. None: q has not been rotated.
        sin: likewise; given exactly when cos is.
        sink: real tokens at the start of each sequence to leave out, >= 0: they are outliers.
        bounds: `[B, 2]` int32 or int64 on q's device: tokens `bounds[b, 0] <= i < bounds[b, 1]` of sequence b are real,
        the
            others padding; clamped to [0, N]. None: all are real.

    Returns:
        `mu [B, H, D]` and `cov [B, H, D, D]`, float32; zeros for a sequence without a real token after the sinks.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Source: Devoto, Jeblick and Jégou, Expected Attention: KV Cache Compression by Estimating Attention from Future
    Queries Distribution, arXiv 2510.00636.
    """
    checks.check_cache("q", q)
    _check_pair("cos", cos, "sin", sin, q.shape[-1])
    for name, tensor in (("cos", cos), ("sin", sin)):
        if tensor is not None:
            _check_floats(name, tensor, checks.DTYPES, ("q", q))
            if tensor.dim() != 3 or tensor.shape[0] not in (1, q.shape[0]) or tensor.shape[1:] != q.shape[2:]:
                batch, _, num_tokens, head_dim = q.shape
                expected = f"[B or 1, N, D] = [{batch} or 1, {num_tokens}, {head_dim}]"
                raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {expected}")
    checks.check_int("sink", sink, minimum=0)
    checks.check_bounds(bounds, q)
    mu, cov = _query_moments(q, cos, sin, min(sink, q.shape[2]), bounds)
    return mu, cov


def expected_attention(
    k: Tensor,
    v: Tensor | None,
    mu: Tensor,
    cov: Tensor | None = None,
    *,
    mean_cos: Tensor | None = None,
    mean_sin: Tensor | None = None,
    scale: float | None = None,
    sink: int = 4,
    epsilon: float = 0.0,
    bounds: Tensor | None = None,
) -> Tensor:
    """Score each token by the attention that queries to come will pay it, times the norm of its value.

    With `R = diag(mean_cos) + diag(mean_sin) P`, `P x = rotate_half(x)`, and h over the H/G query heads of a KV head:
    `logits[h, i] = scale * k_i^T R mu_h + 0.5 * scale^2 * k_i^T R cov_h R^T k_i` and
    `score_i = (mean_h softmax_i(logits[h]) + epsilon) * ||v_i||_2`, the softmax over the real tokens after the sinks.
    In kernels the products with cov round both operands to TF32 where k has 16 bits; k itself is no more exact.

    Args:
        k: `[B, G, N, D]` float32, bfloat16 or float16, any strides: the keys as cached, after RoPE. N may be 0.
        v: of k's shape, dtype and device, or None: the score is then `mean_h softmax_i(logits[h])`.
        mu: `[B, H, D]` float32 on k's device, H a multiple of G: mean query before RoPE, as `query_moments` returns it.
        cov: `[B, H, D, D]` float32 likewise, or None for zeros.
        mean_cos: `[D]`, a float dtype: mean of the rotary embedding's cos over the positions to come (`cos.mean(0)`),
        not
            rounded to 16 bits if it can be avoided. None: queries are not rotated.
        mean_sin: likewise; given exactly when mean_cos is.
        scale: factor of attention's logits; None for `1 / sqrt(D)`.
        sink: real tokens at the start of each sequence that are always kept, >= 0.
        epsilon: added to the expected attention before the norm of v multiplies it, >= 0.
        bounds: `[B, 2]` int32 or int64 on k's device: tokens `bounds[b, 0] <= i < bounds[b, 1]` of sequence b are real,
        the
            others padding; clamped to [0, N]. None: all are real.

    Returns:
        `[B, G, N]` float32, higher is to be kept: +inf for the sinks, -inf for padding.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Source: Devoto, Jeblick and Jégou, Expected Attention: KV Cache Compression by Estimating Attention from Future
    Queries Distribution, arXiv 2510.00636; kvpress 0.5.5, `ExpectedAttentionPress`.
    """
    checks.check_cache("k", k)
    if v is not None:
        checks.check_cache("v", v, ("k", k))
    batch, kv_heads, num_tokens, head_dim = k.shape
    _check_floats("mu", mu, (torch.float32,), ("k", k))
    if mu.dim() != 3 or mu.shape[0] != batch or mu.shape[2] != head_dim:
        raise ValueError(f"mu has shape {list(mu.shape)}, expected [B, H, D] with B = {batch}, D = {head_dim}")
    heads = mu.shape[1]
    if heads < 1 or heads % kv_heads:
        raise ValueError(f"mu has {heads} heads (shape {list(mu.shape)}), expected a multiple of k's {kv_heads}")
    if cov is not None:
        _check_floats("cov", cov, (torch.float32,), ("k", k))
        _check_shape("cov", cov, "[B, H, D, D]", (batch, heads, head_dim, head_dim))
    _check_pair("mean_cos", mean_cos, "mean_sin", mean_sin, head_dim)
    for name, tensor in (("mean_cos", mean_cos), ("mean_sin", mean_sin)):
        if tensor is not None:
            _check_floats(name, tensor, checks.DTYPES, ("k", k))
            _check_shape(name, tensor, "[D]", (head_dim,))
    checks.check_scale(scale)
    checks.check_int("sink", sink, minimum=0)
    if isinstance(epsilon, bool) or not isinstance(epsilon, Real):
        raise TypeError(f"epsilon is {epsilon!r} ({type(epsilon).__name__}), expected a number")
    if not 0 <= float(epsilon) < math.inf:
        raise ValueError(f"epsilon is {epsilon}, expected a finite number >= 0")
    checks.check_bounds(bounds, k)
    scale = head_dim**-0.5 if scale is None else float(scale)
    scores: Tensor = _expected_attention(
        k, v, mu, cov, mean_cos, mean_sin, scale, float(epsilon), min(sink, num_tokens), bounds
    )
    return scores


def _check_floats(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], like: tuple[str, Tensor]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.dtype not in dtypes:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected one of {expected}")
    other_name, other = like
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {other.device}, where {other_name} is")


def _check_shape(name: str, tensor: Tensor, symbols: str, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {symbols} = {list(shape)}")


def _check_pair(cos_name: str, cos: Tensor | None, sin_name: str, sin: Tensor | None, head_dim: int) -> None:
    """Both or neither; and a rotation pairs the halves, so D must have two."""
    if (cos is None) != (sin is None):
        missing, given = (cos_name, sin_name) if cos is None else (sin_name, cos_name)
        raise ValueError(f"{missing} is None, expected a tensor, as {given} is given")
    if cos is not None and head_dim % 2:
        raise ValueError(f"{cos_name} is given with D = {head_dim}, expected an even D")


def _fake_query_moments(args: QueryMomentsArgs) -> tuple[Tensor, Tensor]:
    batch, heads, _, head_dim = args.q.shape
    mu = args.q.new_empty(batch, heads, head_dim, dtype=torch.float32)
    return mu, args.q.new_empty(batch, heads, head_dim, head_dim, dtype=torch.float32)


def _fake_expected_attention(args: ExpectedAttentionArgs) -> Tensor:
    return args.k.new_empty(args.k.shape[:3], dtype=torch.float32)


_query_moments = define("query_moments", QueryMomentsArgs, "(Tensor mu, Tensor cov)", fake=_fake_query_moments)
_expected_attention = define("expected_attention", ExpectedAttentionArgs, "Tensor", fake=_fake_expected_attention)
