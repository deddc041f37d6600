"""window_scores on Triton: kernels/window_scores.py against condense_core/ops/reference/window_scores.py."""

from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core import ops
from condense_core.kernels import launch
from condense_core.kernels import window_scores as kernel
from condense_core.ops import reference
from condense_core.ops.arguments import WindowScoresArgs

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INF, NAN = float("inf"), float("nan")

# Relative to the reference in fp32 on the same rounded inputs, for products of 16-bit numbers are exact in fp32. A
# logit is a sum of up to 256 terms of order 1 (1e-6 in another order), and exp turns its absolute error into a relative
# one; the sum of another order over the keys adds little. Scores far below the largest keep that relative error; atol
# is below any of them. At a scale of 5 logits are a hundred times as large, and so is their absolute error.
TOLERANCES = {"usual": {"rtol": 1e-5, "atol": 1e-9}, "large scale": {"rtol": 1e-3, "atol": 1e-9}}


def draw(
    *,
    batch: int = 1,
    num_kv_heads: int = 2,
    group: int = 2,
    window: int = 8,
    num_tokens: int = 200,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    scale: float = 0.25,
    kernel_size: int = 5,
    bounds: Tensor | None = None,
) -> WindowScoresArgs:
    """Arguments of the op, with keys that grow along the sequence."""
    generator = torch.Generator().manual_seed(0)
    q_win = torch.randn(batch, num_kv_heads * group, window, head_dim, generator=generator) * 2
    k = torch.randn(batch, num_kv_heads, num_tokens, head_dim, generator=generator)
    k *= torch.linspace(0.5, 1.5, num_tokens)[:, None]
    return WindowScoresArgs(
        q_win=q_win.to(DEVICE, dtype), k=k.to(DEVICE, dtype), scale=scale, kernel_size=kernel_size, bounds=bounds
    )


def check(args: WindowScoresArgs) -> Tensor:
    """The kernels' scores, after they were found right."""
    scores = kernel.forward(args)
    assert scores.dtype == torch.float32
    tolerances = TOLERANCES["large scale" if args.scale > 1 else "usual"]
    torch.testing.assert_close(scores, reference.window_scores(*args), equal_nan=True, **tolerances)
    return scores


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"batch": 2, "num_tokens": 300}, id="several-splits-and-ranges"),
        pytest.param({"num_kv_heads": 3, "group": 1, "window": 5, "num_tokens": 131, "head_dim": 20}, id="mha"),
        pytest.param({"num_kv_heads": 1, "group": 4, "window": 40, "head_dim": 24}, id="two-row-tiles"),
        pytest.param({"num_kv_heads": 1, "group": 5, "window": 62, "num_tokens": 150}, id="three-row-tiles-of-128"),
        pytest.param({"num_kv_heads": 1, "window": 1, "num_tokens": 97, "head_dim": 40}, id="tova"),
        # Keys 256 to 259, the second split, come after all that the first rows may see.
        pytest.param({"num_kv_heads": 1, "group": 1, "num_tokens": 260}, id="a-split-that-early-rows-do-not-see"),
        pytest.param({"window": 64, "num_tokens": 65}, id="all-forced-but-one"),
        pytest.param({"window": 33, "num_tokens": 33, "head_dim": 8}, id="all-forced"),
        pytest.param({"num_kv_heads": 1, "group": 1, "window": 1, "num_tokens": 1, "head_dim": 1}, id="one-number"),
    ],
)
def test_shapes(shape: dict[str, int], dtype: torch.dtype) -> None:
    args = draw(**shape, dtype=dtype)
    scores = check(args)
    scored = args.k.shape[2] - args.q_win.shape[2]
    assert torch.isposinf(scores[..., scored:]).all()
    assert scores[..., :scored].isfinite().all()


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    num_kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    num_tokens=st.integers(1, 220),
    head_dim=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    radius=st.integers(0, 6),
    data=st.data(),
)
def test_any_shape_and_padding(
    batch: int, num_tokens: int, head_dim: int, radius: int, data: st.DataObject, **shape: Any
) -> None:
    place = st.integers(-2, num_tokens + 2)
    bounds = data.draw(st.none() | st.lists(st.tuples(place, place), min_size=batch, max_size=batch))
    args = draw(
        batch=batch,
        window=data.draw(st.integers(1, min(num_tokens, 30))),
        num_tokens=num_tokens,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        kernel_size=2 * radius + 1,
        bounds=None if bounds is None else torch.tensor(bounds, device=DEVICE),
        **shape,
    )
    check(args)


# A window of 8: many keys left of it, few, one, none; nothing at all; beyond what is there.
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize(
    "bounds",
    [
        pytest.param([[40, 200], [150, 200]], id="left"),
        pytest.param([[63, 130], [0, 9]], id="right"),
        pytest.param([[60, 68], [3, 6]], id="not-more-than-the-window"),
        pytest.param([[7, 7], [30, 9]], id="no-real-token"),
        pytest.param([[-4, 10**6], [199, 10**6]], id="beyond-the-tensor"),
    ],
)
def test_what_stands_in_the_padding_has_no_influence(bounds: list[list[int]], index_dtype: torch.dtype) -> None:
    on_device = torch.tensor(bounds, dtype=index_dtype, device=DEVICE)
    args = draw(batch=2, num_kv_heads=1, kernel_size=3, dtype=torch.float16, bounds=on_device)
    scores = check(args)
    for b, (start, stop) in enumerate(bounds):
        start, stop = min(max(start, 0), 200), min(max(stop, 0), 200)
        args.k[b, :, :start], args.k[b, :, max(stop, start) :] = NAN, NAN
        args.q_win[b, :, : max(0, 8 - max(stop - start, 0))] = NAN  # of tokens before the first one
    assert torch.equal(kernel.forward(args), scores)


@pytest.mark.parametrize("kernel_size", [1, 7, 65, 131, 10**9 + 1])
def test_pooling_crosses_tiles(kernel_size: int) -> None:
    bounds = torch.tensor([[30, 160]], device=DEVICE)
    check(draw(num_kv_heads=1, num_tokens=180, kernel_size=kernel_size))
    check(draw(num_kv_heads=1, num_tokens=180, kernel_size=kernel_size, bounds=bounds))


@pytest.mark.parametrize("scale", [-0.3, 0.0, 5.0])
def test_any_scale(scale: float, dtype: torch.dtype) -> None:
    assert check(draw(num_kv_heads=1, scale=scale, dtype=dtype))[..., :192].isfinite().all()


def test_strides_do_not_matter() -> None:
    bounds = torch.tensor([[1, 100], [20, 90]], device=DEVICE)
    args = draw(batch=2, window=6, num_tokens=100, head_dim=24, dtype=torch.float16, bounds=bounds)
    expected = kernel.forward(args)

    def views(x: Tensor) -> dict[str, Tensor]:
        return {
            "as a projection leaves it": x.transpose(1, 2).contiguous().transpose(1, 2),
            "half of a row": torch.cat([x, x], 3)[..., 24:],
            "half of the tokens": torch.cat([x, x], 2)[:, :, x.shape[2] :],
            "channels apart": x.transpose(2, 3).contiguous().transpose(2, 3),
        }

    k_views = views(args.k)
    for name, q_view in views(args.q_win).items():
        assert torch.equal(kernel.forward(args._replace(q_win=q_view, k=k_views[name])), expected), name
    columns = bounds.t().contiguous().t()
    assert torch.equal(kernel.forward(args._replace(bounds=columns)), expected)


def test_nan_reaches_what_depends_on_it_and_no_more() -> None:
    args = draw(batch=2, dtype=torch.float16)
    clean = kernel.forward(args)
    for token in (3, 195, 199):  # a key before the window, one inside, the last one, which only the last row sees
        poisoned = args.k.clone()
        poisoned[1, 0, token, 7] = NAN
        scores = check(args._replace(k=poisoned))
        assert scores[1, 0, :192].isnan().all()
        assert torch.isposinf(scores[1, 0, 192:]).all()
        assert torch.equal(scores[0], clean[0])
        assert torch.equal(scores[1, 1], clean[1, 1])
    args.q_win[0, 3, 2, 0] = NAN
    scores = check(args)
    assert scores[0, 1, :192].isnan().all()
    assert torch.equal(scores[0, 0], clean[0, 0])


def test_keys_at_infinity_are_as_in_the_reference() -> None:
    args = draw(num_kv_heads=1, group=1, window=2, num_tokens=140, kernel_size=1)
    args.q_win.abs_()
    args.k.abs_()
    args.k[0, 0, 5] = args.k[0, 0, 64:128] = -INF  # no attention; a whole tile without any
    assert check(args)[0, 0, 64:128].eq(0).all()
    args.k[0, 0, 7] = INF
    assert check(args)[0, 0, :138].isnan().all()


def test_the_same_bits_every_time(dtype: torch.dtype) -> None:
    args = draw(num_tokens=300, dtype=dtype)
    assert torch.equal(kernel.forward(args), kernel.forward(args))


def test_without_pooling_the_scores_are_what_the_window_leaves() -> None:
    """Attention sums to one: that on the scored keys, and that inside the window, made small here by its keys."""
    args = draw(num_kv_heads=1, group=1, window=4, num_tokens=180, kernel_size=1)
    q, k = args.q_win[0, 0], args.k[0, 0]
    k[176:] = -8 * q.mean(0) / q.mean(0).norm()
    inside = (q @ k.t() * args.scale).softmax(-1)[:, 176:].sum(-1)
    total = kernel.forward(args)[0, 0, :176].sum()
    assert inside.max() < 0.5
    assert 0.5 < float(total) < 1.0


@pytest.mark.usefixtures("triton_backend")
def test_the_public_op_runs_it_or_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[WindowScoresArgs] = []
    monkeypatch.setattr(kernel, "forward", lambda args, run=kernel.forward: seen.append(args) or run(args))
    narrow, wide = draw(num_tokens=40), draw(window=2, num_tokens=6, head_dim=257)
    for args in (narrow, wide):
        expected = reference.window_scores(*args)
        actual = ops.window_scores(args.q_win, args.k, scale=args.scale)
        torch.testing.assert_close(actual, expected, **TOLERANCES["usual"])
    assert [(args.scale, args.kernel_size, args.bounds) for args in seen] == [(0.25, 5, None)]
    assert "head_dim is 257" in str(kernel.unsupported(wide))


@pytest.mark.parametrize(
    ("num_heads", "limit"), [pytest.param(32, 2**20, id="mistral"), pytest.param(64, 2**21, id="twice-the-heads")]
)
def test_temporaries_are_small(num_heads: int, limit: int) -> None:
    """No tensor of every row and key: all that a call allocates besides the scores."""
    q_win = torch.empty(1, num_heads, 64, 128, dtype=torch.bfloat16, device="meta")
    k = torch.empty(1, 8, 2048, 128, dtype=torch.bfloat16, device="meta")
    for target in launch.TARGETS.values():
        with launch.record(target) as launches:
            kernel.forward(WindowScoresArgs(q_win=q_win, k=k, scale=128**-0.5, kernel_size=5, bounds=None))
        assert len(launches) == 2
        tensors = {id(x): x for made in launches for x in made.args if isinstance(x, Tensor)}
        temporaries = [x for x in tensors.values() if x is not q_win and x is not k and x.shape != k.shape[:3]]
        assert sum(x.nbytes for x in temporaries) <= limit
