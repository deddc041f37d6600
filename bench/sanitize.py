"""Every op once at a small odd size, forward and backward, for compute-sanitizer to watch. Called by `make gpu`.

The sizes leave tails in every tile: a load or store that its mask does not cover leaves its allocation.
"""

import sys
from typing import Any

import torch
from torch import Tensor

from condense_core import ops

BATCH, KV_HEADS, GROUP, TOKENS, HEAD_DIM = 2, 2, 3, 301, 48
HEADS = KV_HEADS * GROUP


def main() -> int:
    """Run them on the GPU, or on the CPU where there is none."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    _pooling(device)
    _scores(device)
    _decoding(device)
    _moving(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"every op ran on {device}")
    return 0


def _random(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def _pooling(device: torch.device) -> None:
    width, lengths = HEADS * HEAD_DIM, torch.tensor([0, 5, 5, 130, TOKENS])
    weight = _random(device, width).requires_grad_()
    x = _random(device, TOKENS, width).requires_grad_()
    for ratio, halo in ((4, 0), (7, 3), (200, 0)):
        rows = int(ops.window_offsets(lengths, ratio)[-1])
        bias = _random(device, HEADS, ratio + 2 * halo).requires_grad_()
        for q in (_random(device, HEADS, HEAD_DIM), _random(device, rows, HEADS, HEAD_DIM)):
            options: dict[str, Any] = {
                "ratio": ratio,
                "halo": halo,
                "cu_seqlens": lengths,
                "norm_weight": weight,
                "window_bias": bias,
            }
            ops.attention_pool(x, q.requires_grad_(), **options).sum().backward()
    q = _random(device, 17, HEADS, HEAD_DIM).requires_grad_()
    ops.cross_pool(x, q, norm_weight=weight).sum().backward()
    ops.cross_pool(x, q, cu_seqlens=lengths, cu_queries=torch.tensor([0, 3, 5, 5, 17])).sum().backward()


def _scores(device: torch.device) -> None:
    k, v = (_random(device, BATCH, KV_HEADS, TOKENS, HEAD_DIM) for _ in range(2))
    q = _random(device, BATCH, HEADS, TOKENS, HEAD_DIM)
    for bounds in (None, torch.tensor([[0, TOKENS - 9], [11, TOKENS]], device=device)):
        ops.window_scores(q[:, :, -33:].contiguous(), k, bounds=bounds)
        ops.key_norm(k, sink=4, window=7, bounds=bounds)
        ops.key_similarity(k, sink=4, window=7, bounds=bounds)
        ops.lag_scores(k, v, lag_size=30, bounds=bounds)
        ops.expected_attention(k, v, *ops.query_moments(q, bounds=bounds), bounds=bounds)
        ops.non_causal_chunks(q, k, chunk_size=100, bounds=bounds)
        ops.value_projection_norm(v, _random(device, 200, HEADS * HEAD_DIM), bounds=bounds)


def _decoding(device: torch.device) -> None:
    cu_seqlens = torch.tensor([0, 0, 1, 250, 900], device=device)
    k, v = (_random(device, 900, HEAD_DIM) for _ in range(2))
    lengths = torch.tensor([0, 1, 200, 650], device=device)
    for kept in (None, lengths):
        ops.ragged_decode_attention(_random(device, BATCH, HEADS, HEAD_DIM), k, v, cu_seqlens, lengths=kept)


def _moving(device: torch.device) -> None:
    k, v = (_random(device, BATCH, KV_HEADS, TOKENS, HEAD_DIM) for _ in range(2))
    scores = torch.randn(BATCH, KV_HEADS, TOKENS, device=device)
    angles = torch.rand(TOKENS, HEAD_DIM // 2, device=device)
    protect = torch.tensor([[[0, 4], [TOKENS - 3, TOKENS]]], device=device)
    indices, _ = ops.select(scores, 77, protect=protect)
    ops.compact(k, v, indices, rotate=(angles.cos(), angles.sin()))
    shared, counts = ops.select(scores, 77, scope="layer")
    cu_indices = torch.cat([counts.new_zeros(1), counts.flatten().cumsum(0)])
    rows, values = ops.compact(k, v, shared.flatten(), cu_indices=cu_indices)
    ops.compact_(k, v, indices)
    new = _random(device, BATCH, KV_HEADS, 2, HEAD_DIM)
    ops.ragged_append(rows, values, cu_indices, counts.flatten() - 1, new, new.clone())


if __name__ == "__main__":
    sys.exit(main())
