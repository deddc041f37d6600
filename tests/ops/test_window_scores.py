"""window_scores: the specification against a loop, the public function, and its registration."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from condense_core import ops
from condense_core.ops import reference
from tests.ops.oracles import INF, Bounds, attention, on_device, real_tokens

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

# Against the oracle in fp64 on the same rounded inputs. float64: sums of some dozens of terms in another order.
# float32, and the 16-bit types, which are computed in it: logits of order 10 carry 1e-6, which exp makes relative.
TOLERANCES = {
    torch.float64: {"atol": 1e-14, "rtol": 1e-11},
    torch.float32: {"atol": 1e-8, "rtol": 1e-5},
    torch.bfloat16: {"atol": 1e-8, "rtol": 1e-5},
    torch.float16: {"atol": 1e-8, "rtol": 1e-5},
}


def draw(
    *, heads: int = 4, kv_heads: int = 2, window: int, tokens: int, head_dim: int, dtype: torch.dtype, batch: int = 2
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q_win = torch.randn(batch, heads, window, head_dim, generator=generator, dtype=torch.float64)
    k = torch.randn(batch, kv_heads, tokens, head_dim, generator=generator, dtype=torch.float64)
    return q_win.to(dtype), k.to(dtype)


def oracle(q_win: Tensor, k: Tensor, scale: float, kernel_size: int, bounds: Bounds) -> Tensor:
    """One key of one head after the other."""
    batch, heads, window, _ = q_win.shape
    kv_heads, tokens = k.shape[1:3]
    scores = torch.full((batch, kv_heads, tokens), -INF, dtype=torch.float64)
    for b in range(batch):
        real = real_tokens(bounds, b, tokens)
        start, stop = real.start, max(real.start, real.stop)
        for g in range(kv_heads):
            keys = k[b, g].double().tolist()
            own = range(g * heads // kv_heads, (g + 1) * heads // kv_heads)
            received = {h: [0.0] * tokens for h in own}
            for h in own:
                rows = [t for t in range(window) if stop - window + t >= start]
                for t in rows:
                    p = attention(q_win[b, h, t].double().tolist(), keys[start : stop - window + t + 1], scale)
                    for i, weight in enumerate(p, start):
                        received[h][i] += weight / len(rows)
            for i in range(start, stop):
                if i >= stop - window:
                    scores[b, g, i] = INF
                    continue
                near = range(max(start, i - kernel_size // 2), min(stop - window, i + kernel_size // 2 + 1))
                scores[b, g, i] = sum(received[h][j] for h in own for j in near) / kernel_size / len(own)
    return scores


def check(q_win: Tensor, k: Tensor, scale: float | None, kernel_size: int, bounds: Bounds) -> None:
    actual = reference.window_scores(q_win=q_win, k=k, scale=scale, kernel_size=kernel_size, bounds=on_device(bounds))
    assert actual.dtype == (torch.float64 if k.dtype == torch.float64 else torch.float32)
    expected = oracle(q_win, k, k.shape[3] ** -0.5 if scale is None else scale, kernel_size, bounds)
    torch.testing.assert_close(actual.double(), expected, **TOLERANCES[k.dtype])


FORMS = {
    "grouped heads": {"heads": 4, "kv_heads": 2, "window": 5, "kernel_size": 5, "scale": None},
    "TOVA": {"heads": 3, "kv_heads": 1, "window": 1, "kernel_size": 1, "scale": 0.7},
    "a window of all tokens": {"heads": 2, "kv_heads": 2, "window": 17, "kernel_size": 3, "scale": -0.2},
    "pooling wider than the tokens": {"heads": 2, "kv_heads": 1, "window": 4, "kernel_size": 41, "scale": 0.0},
}
BOUNDS = {
    "all real": None,
    "padding on the right, on the left": [[0, 13], [4, 17]],
    "padding on both sides, fewer tokens than the window": [[2, 12], [13, 16]],
    "nothing real, beyond the tokens": [[5, 5], [-3, 40]],
    "one token, crossed": [[16, 17], [9, 3]],
}


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS.keys())
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_it_equals_a_walk_key_by_key(form: dict[str, Any], bounds: Bounds) -> None:
    sizes = {name: form[name] for name in ("heads", "kv_heads", "window")}
    q_win, k = draw(**sizes, tokens=17, head_dim=6, dtype=torch.float64)
    check(q_win, k, form["scale"], form["kernel_size"], bounds)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    q_win, k = draw(window=5, tokens=17, head_dim=6, dtype=dtype)
    check(q_win, k, None, 5, [[0, 13], [4, 17]])


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 14),
    window=st.integers(1, 14),
    group=st.integers(1, 3),
    kernel_size=st.sampled_from([1, 3, 5, 31]),
    start=st.integers(-2, 8),
    stop=st.integers(0, 16),
)
def test_any_lengths(tokens: int, window: int, group: int, kernel_size: int, start: int, stop: int) -> None:
    q_win, k = draw(
        batch=1,
        heads=group,
        kv_heads=1,
        window=min(window, tokens),
        tokens=tokens,
        head_dim=3,
        dtype=torch.float64,
    )
    check(q_win, k, None, kernel_size, [[start, stop]])


def test_scores_are_those_of_kvpress() -> None:
    """The formula of SnapKVPress, version 0.5.5, in its own terms: repeated keys, a triangular mask, avg_pool1d."""
    w, n, d, kernel_size = 8, 50, 16, 5
    q_win, k = draw(heads=6, kv_heads=2, window=w, tokens=n, head_dim=d, dtype=torch.float32)
    weights = q_win @ k.repeat_interleave(3, 1).transpose(2, 3) / math.sqrt(d)
    weights += torch.triu(torch.full((w, n), -INF), diagonal=n - w + 1)
    votes = weights.softmax(-1)[..., :-w].mean(-2)
    pooled = F.avg_pool1d(votes, kernel_size, padding=kernel_size // 2, stride=1)
    expected = pooled.view(2, 2, 3, n - w).mean(2)
    actual = ops.window_scores(q_win, k, kernel_size=kernel_size)
    torch.testing.assert_close(actual[..., :-w], expected, **TOLERANCES[torch.float32])
    assert torch.isposinf(actual[..., -w:]).all()


def test_padding_is_not_read() -> None:
    bounds = torch.tensor([[3, 15], [14, 17]])
    q_win, k = draw(window=5, tokens=17, head_dim=6, dtype=torch.float32)
    clean = ops.window_scores(q_win, k, bounds=bounds)
    for b, (start, stop) in enumerate(bounds.tolist()):
        k[b, :, :start], k[b, :, stop:] = float("nan"), INF
    q_win[1, :, :2] = float("nan")  # rows that stand before the first of three tokens
    assert torch.equal(ops.window_scores(q_win, k, bounds=bounds), clean)


K = torch.ones(2, 2, 9, 8)
Q = torch.ones(2, 4, 9, 8)


@pytest.mark.parametrize(
    ("change", "error", "parts"),
    [
        pytest.param({"k": [1.0]}, TypeError, ["k is a list"], id="k of list"),
        pytest.param({"k": K.double()}, TypeError, ["k has dtype torch.float64"], id="dtype of k"),
        pytest.param({"k": K[0]}, ValueError, ["k has shape [2, 9, 8]", "[B, G, N, D]"], id="rank of k"),
        pytest.param({"k": K[..., :0]}, ValueError, ["k has shape [2, 2, 9, 0]", "D >= 1"], id="no channels"),
        pytest.param({"k": K.to("meta")}, ValueError, ["cpu", "meta"], id="two devices"),
        pytest.param({"k": K.half()}, TypeError, ["has dtype torch.float32, expected torch.float16"], id="two dtypes"),
        pytest.param({"k": K[:1]}, ValueError, ["B = 1"], id="another batch"),
        pytest.param({"k": K[..., :4]}, ValueError, ["D = 4"], id="another head_dim"),
        pytest.param({"k": torch.ones(2, 3, 9, 8)}, ValueError, ["4 heads", "a multiple of k's 3"], id="heads"),
        pytest.param({"k": K[:, :, :0]}, ValueError, ["3 queries", "at most k's 0 tokens"], id="no tokens"),
        pytest.param({"scale": INF}, ValueError, ["scale is inf"], id="infinite scale"),
        pytest.param({"scale": "1"}, TypeError, ["scale is '1' (str)"], id="scale of text"),
        pytest.param({"bounds": [[0, 9]]}, TypeError, ["bounds is a list"], id="bounds of list"),
        pytest.param({"bounds": torch.ones(2, 2)}, TypeError, ["dtype torch.float32"], id="bounds of floats"),
        pytest.param({"bounds": torch.ones(3, 2).long()}, ValueError, ["[3, 2]", "[2, 2]"], id="bounds of 3"),
        pytest.param(
            {"bounds": torch.ones(2, 2, device="meta").long()}, ValueError, ["bounds is on meta"], id="bounds elsewhere"
        ),
        pytest.param({"q_win": None}, TypeError, ["q_win is a NoneType"], id="no q_win"),
        pytest.param({"q_win": Q[0]}, ValueError, ["q_win has shape [4, 9, 8]"], id="rank of q_win"),
        pytest.param({"q_win": Q[:, :, :0]}, ValueError, ["shape [2, 4, 0, 8]", "w >= 1"], id="no queries"),
        pytest.param(
            {"q_win": torch.ones(2, 4, 10, 8)},
            ValueError,
            ["10 queries", "at most k's 9 tokens"],
            id="too many queries",
        ),
        pytest.param({"kernel_size": 4}, ValueError, ["kernel_size is 4", "odd"], id="even kernel_size"),
        pytest.param({"kernel_size": 0}, ValueError, ["kernel_size is 0", ">= 1"], id="kernel_size of 0"),
        pytest.param({"kernel_size": 5.0}, TypeError, ["kernel_size is 5.0 (float)"], id="kernel_size of float"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], parts: list[str]) -> None:
    with pytest.raises(error) as raised:
        ops.window_scores(**{"q_win": Q[:, :, :3], "k": K, **change})
    assert all(part in str(raised.value) for part in parts), str(raised.value)


def test_it_passes_opcheck() -> None:
    q_win, k = draw(window=3, tokens=9, head_dim=8, dtype=torch.float32)
    bounds = torch.tensor([[0, 7], [3, 9]])
    torch.library.opcheck(torch.ops.condense_core.window_scores.default, (q_win, k, 0.3, 3, bounds))


def test_it_is_traced_without_a_break() -> None:
    def scores(q_win: Tensor, k: Tensor) -> Tensor:
        return ops.window_scores(q_win, 2 * k, kernel_size=3) + 1

    q_win, k = draw(window=3, tokens=9, head_dim=8, dtype=torch.float32)
    assert torch.equal(torch.compile(scores, fullgraph=True, backend="eager")(q_win, k), scores(q_win, k))
