"""What is measured: every op at the shapes of Mistral-7B, beside its rivals.

A case counts the bytes and operations that the op cannot avoid: `bytes` is every input once and every output once,
`flops` the multiply-adds of its products, twice. Both belong to the operation, not to an implementation.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import baselines, suites_cache
from bench.cases import OURS, Case, Goal, Sizes, normal
from condense_core import ops
from condense_core.ops import reference


def cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """All of them, one after another, so that one's tensors are gone before the next one's are made."""
    yield from _pooling(sizes, device)
    for n in (sizes.short, sizes.long):
        yield from _scores(sizes, n, device)
    yield from suites_cache.cases(sizes, device)
    yield from _decoding(sizes, device)


def _pooling(s: Sizes, device: torch.device) -> Iterator[Case]:
    for sequences in (1, 16):
        yield from _attention_pool(s, sequences, device)
    yield _cross_pool(s, device)


def _attention_pool(s: Sizes, sequences: int, device: torch.device) -> Iterator[Case]:
    eps, ratio = 1e-5, 4
    rows = sequences * -(-s.tokens // ratio)
    tokens = sequences * s.tokens
    shape = f"{sequences} x {s.tokens} tokens, d {s.width}, ratio {ratio}, {s.heads} heads"
    cu_seqlens = s.tokens * torch.arange(sequences + 1) if sequences > 1 else None
    options: dict[str, Any] = {"ratio": ratio, "cu_seqlens": cu_seqlens, "eps": eps}

    def inputs(seed: int) -> tuple[Tensor, ...]:
        x = normal(seed, device, sequences, s.tokens, s.width)
        return x, normal(seed + 1, device, s.heads, s.head_dim), normal(seed + 2, device, s.width)

    def ours(x: Tensor, q: Tensor, w: Tensor) -> Tensor:
        return ops.attention_pool(x.flatten(0, 1), q, norm_weight=w, **options)

    def expected(x: Tensor, q: Tensor, w: Tensor) -> Tensor:
        return reference.attention_pool(x.flatten(0, 1).float(), q.float(), norm_weight=w.float(), **options)

    eager = {
        "eager einsum": partial(baselines.pool_einsum, ratio=ratio, eps=eps),
        "eager elementwise": partial(baselines.pool_elementwise, ratio=ratio, eps=eps),
    }
    compiled = torch.compile(eager["eager elementwise"])
    yield Case(
        f"attention_pool {sequences}x{s.tokens}",
        shape,
        bytes=2 * s.width * (tokens + rows),
        flops=4 * s.width * tokens,
        inputs=inputs,
        variants={OURS: ours, **eager, "compile elementwise": compiled},
        expected=expected,
        goals=(Goal("us", 12.0),)
        if sequences == 1
        else (Goal("copy", 0.85), Goal("speed-up", 6.0, "eager"), Goal("speed-up", 2.0, "compile")),
    )
    yield Case(
        f"attention_pool backward {sequences}x{s.tokens}",
        shape,
        bytes=2 * s.width * (2 * tokens + 2 * rows),
        flops=16 * s.width * tokens,
        inputs=inputs,
        variants={
            OURS: _Backward(ours),
            "eager elementwise": _Backward(eager["eager elementwise"]),
            "compile elementwise": _Backward(compiled),
        },
        expected=_Backward(expected),
        goals=(Goal("speed-up", 4.0, "eager"),) if sequences > 1 else (),
    )


def _cross_pool(s: Sizes, device: torch.device) -> Case:
    eps, queries = 1e-5, -(-s.tokens // 4)
    return Case(
        f"cross_pool {queries}x{s.tokens}",
        f"{queries} queries over {s.tokens} tokens, d {s.width}, {s.heads} heads",
        bytes=2 * s.width * (s.tokens + 2 * queries),
        flops=4 * queries * s.tokens * s.width,
        inputs=lambda seed: (
            normal(seed, device, s.tokens, s.width),
            normal(seed + 1, device, queries, s.heads, s.head_dim),
            normal(seed + 2, device, s.width),
        ),
        variants={
            OURS: lambda x, q, w: ops.cross_pool(x, q, norm_weight=w, eps=eps),
            "sdpa": partial(baselines.cross_pool_sdpa, eps=eps),
            "compile sdpa": torch.compile(partial(baselines.cross_pool_sdpa, eps=eps)),
        },
        expected=lambda x, q, w: reference.cross_pool(x.float(), q.float(), norm_weight=w.float(), eps=eps),
    )


class _Backward:
    """The gradient of the first input alone: the graph is made once for each set of inputs, and walked every time."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        self.forward = forward
        self.graphs: dict[int, tuple[Tensor, tuple[Tensor, ...], Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        if inputs[0].data_ptr() not in self.graphs:
            leaves = tuple(tensor.detach().requires_grad_() for tensor in inputs)
            out = self.forward(*leaves)
            grad = normal(99, out.device, *out.shape).to(out.dtype)
            self.graphs[inputs[0].data_ptr()] = (out, leaves, grad)
        out, leaves, grad = self.graphs[inputs[0].data_ptr()]
        return torch.autograd.grad(out, leaves, grad, retain_graph=True)[0].flatten(0, -2)


def _scores(s: Sizes, n: int, device: torch.device) -> Iterator[Case]:
    heads, kv, d = s.heads, s.kv_heads, s.head_dim
    window = 64
    cache = 2 * kv * n * d  # bytes of the keys, or of the values, of one layer

    def keys(seed: int) -> tuple[Tensor, ...]:
        return (normal(seed, device, 1, kv, n, d),)

    def keys_values(seed: int) -> tuple[Tensor, ...]:
        return normal(seed, device, 1, kv, n, d), normal(seed + 1, device, 1, kv, n, d)

    def case(name: str, *, scores: int = 4 * kv * n, **rest: Any) -> Case:
        rest["bytes"] += scores
        shape = f"n {n}, {heads}/{kv} heads, d {d}"
        return Case(f"{name} n={n}", shape, **rest)

    yield case(
        "window_scores",
        bytes=cache + 2 * heads * window * d,
        flops=4 * heads * window * n * d,
        inputs=lambda seed: (normal(seed, device, 1, heads, window, d), normal(seed + 1, device, 1, kv, n, d)),
        variants={
            OURS: lambda q, k: ops.window_scores(q, k),
            "kvpress SnapKV": baselines.snapkv,
            "compile SnapKV": torch.compile(baselines.snapkv),
        },
        expected=lambda q, k: reference.window_scores(q.float(), k.float()),
        goals=(Goal("speed-up", 8.0, "kvpress"), Goal("temporaries", 2**20)) if n == s.short else (Goal("copy", 0.5),),
    )
    yield case(
        "key_norm",
        bytes=cache,
        flops=2 * kv * n * d,
        inputs=keys,
        variants={
            OURS: lambda k: ops.key_norm(k),
            "kvpress Knorm": baselines.knorm,
            "compile Knorm": torch.compile(baselines.knorm),
        },
        expected=lambda k: reference.key_norm(k.float()),
    )
    yield case(
        "key_similarity",
        bytes=cache,
        flops=6 * kv * n * d,
        inputs=keys,
        variants={
            OURS: lambda k: ops.key_similarity(k),
            "kvpress KeyDiff": baselines.keydiff,
            "compile KeyDiff": torch.compile(baselines.keydiff),
        },
        expected=lambda k: reference.key_similarity(k.float()),
    )
    yield case(
        "lag_scores",
        bytes=2 * cache,
        flops=12 * kv * n * d,
        inputs=keys_values,
        variants={
            OURS: lambda k, v: ops.lag_scores(k, v),
            "kvpress LagKV": baselines.lagkv,
            "compile LagKV": torch.compile(baselines.lagkv),
        },
        expected=lambda k, v: reference.lag_scores(k.float(), v.float()),
    )
    yield case(
        "expected_attention",
        bytes=2 * cache + 2 * heads * n * d,
        flops=4 * heads * n * d * d,
        inputs=lambda seed: (
            normal(seed, device, 1, heads, n, d),
            normal(seed + 1, device, 1, kv, n, d),
            normal(seed + 2, device, 1, kv, n, d),
        ),
        variants={
            OURS: lambda q, k, v: ops.expected_attention(k, v, *ops.query_moments(q)),
            "kvpress ExpectedAttention": lambda q, k, v: baselines.expected_attention(
                k, v, *baselines.query_statistics(q[:, :, 4:])
            ),
        },
        expected=lambda q, k, v: reference.expected_attention(
            k.float(), v.float(), *reference.query_moments(q.float())
        ),
        goals=(Goal("layer", 0.02),) if n == s.short else (),
    )
    yield case(
        "non_causal_chunks",
        bytes=cache + 2 * heads * n * d,
        flops=2 * heads * n * 256 * d,
        inputs=lambda seed: (normal(seed, device, 1, heads, n, d), normal(seed + 1, device, 1, kv, n, d)),
        variants={
            OURS: lambda q, k: ops.non_causal_chunks(q, k),
            "kvpress NonCausal": baselines.non_causal,
            "compile NonCausal": torch.compile(baselines.non_causal),
        },
        expected=lambda q, k: reference.non_causal_chunks(q.float(), k.float()),
    )
    if n == s.short:
        yield case(
            "value_projection_norm",
            bytes=cache + 2 * s.width * heads * d,
            flops=2 * heads * n * d * s.width,
            inputs=lambda seed: (normal(seed, device, 1, kv, n, d), normal(seed + 1, device, s.width, heads * d)),
            variants={
                OURS: lambda v, w: ops.value_projection_norm(v, w),
                "kvpress CriticalKV": partial(baselines.value_projection, heads=heads),
                "compile CriticalKV": torch.compile(partial(baselines.value_projection, heads=heads)),
            },
            expected=lambda v, w: reference.value_projection_norm(v.float(), w.float()),
        )


def _decoding(s: Sizes, device: torch.device) -> Iterator[Case]:
    kept, kv, d = s.long // 8, s.kv_heads, s.head_dim
    # Heads keep from a quarter to seven quarters of the average.
    lengths = torch.linspace(kept / 4, 7 * kept / 4, kv).round().long()
    lengths[-1] += kv * kept - lengths.sum()
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).to(device)
    total = kv * kept

    def inputs(seed: int) -> tuple[Tensor, ...]:
        q = normal(seed, device, 1, s.heads, d)
        ragged = [normal(seed + i, device, total, d) for i in (1, 2)]
        full = [normal(seed + i, device, 1, kv, s.long, d) for i in (3, 4)]
        return (q, *ragged, *full)

    def uniform(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
        return baselines.sdpa_decode(q, k.view(1, kv, kept, d), v.view(1, kv, kept, d))

    yield Case(
        f"ragged_decode_attention {kept} of {s.long}",
        f"{kept} of {s.long} tokens kept on average, {s.heads}/{kv} heads, d {d}, batch 1",
        bytes=4 * total * d,
        flops=4 * s.heads * kept * d,
        inputs=inputs,
        variants={
            OURS: lambda q, k, v, *_: ops.ragged_decode_attention(q, k, v, cu_seqlens),
            "sdpa full cache": lambda q, _k, _v, k, v: baselines.sdpa_decode(q, k, v),
            "uniform sdpa": uniform,
        },
        expected=lambda q, k, v, *_: reference.ragged_decode_attention(q.float(), k.float(), v.float(), cu_seqlens),
        goals=(Goal("speed-up", 5.0, "sdpa full"), Goal("speed-up", 1 / 1.15, "uniform")),
    )
