"""key_similarity on Triton: kernels/key_similarity.py against condense_core/ops/reference/key_similarity.py."""

from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core import ops
from condense_core.kernels import key_similarity as kernel
from condense_core.kernels.launch import TARGETS, record
from condense_core.ops import reference
from condense_core.ops.arguments import KeySimilarityArgs

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INF, NAN = float("inf"), float("nan")

# Cosines, of order 1. Kernel and reference compute in fp32 from the same input, so the dtype does not matter: another
# order of summation over at most some hundred tokens and 256 channels, a few units of 2^-23 each.
TOLERANCES = {"rtol": 0.0, "atol": 2e-6}


def draw(
    *,
    batch: int = 2,
    num_kv_heads: int = 2,
    num_tokens: int = 100,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> KeySimilarityArgs:
    """Arguments of the op: keys around a common direction, as real ones are, of very different norm."""
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(batch, num_kv_heads, num_tokens, head_dim, generator=generator)
    k += torch.randn(num_kv_heads, 1, head_dim, generator=generator)
    k *= torch.linspace(0.1, 6.0, max(num_tokens, 1))[:num_tokens, None]
    return KeySimilarityArgs(k=k.to(DEVICE, dtype), sink=0, window=0, bounds=None)._replace(**changes)


def check(args: KeySimilarityArgs) -> Tensor:
    """The kernels' scores, after they were found right."""
    scores = kernel.forward(args)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, reference.key_similarity(*args), equal_nan=True, **TOLERANCES)
    return scores


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"num_tokens": 40, "head_dim": 128}, id="one-run-of-two-tiles"),
        pytest.param({"num_kv_heads": 1, "num_tokens": 300, "head_dim": 96}, id="several-runs"),
        pytest.param({"num_tokens": 33, "head_dim": 80}, id="head_dim-no-power-of-two"),
        pytest.param({"batch": 1, "num_kv_heads": 1, "num_tokens": 65, "head_dim": 256}, id="head_dim-256"),
        pytest.param({"batch": 1, "num_kv_heads": 1, "num_tokens": 1, "head_dim": 1}, id="one-number"),
        pytest.param({"num_tokens": 0}, id="no-tokens"),
    ],
)
def test_shapes(shape: dict[str, int]) -> None:
    check(draw(**shape))


def test_dtypes(dtype: torch.dtype) -> None:
    check(draw(dtype=dtype))


def test_several_tiles_to_a_run_and_several_runs_to_a_head() -> None:
    args = draw(num_kv_heads=1, num_tokens=700, head_dim=128, sink=4, window=16)
    with record(TARGETS[90]) as launches:
        kernel.forward(args._replace(k=args.k.to("meta")))
    values = dict(zip(launches[0].kernel.arg_names, launches[0].args, strict=False))
    assert values["splits"] > 1
    assert values["run"] > launches[0].constexprs["BLOCK_N"]
    check(args._replace(bounds=torch.tensor([[129, 650], [0, 700]], device=DEVICE)))


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 2),
    num_kv_heads=st.integers(1, 3),
    num_tokens=st.integers(1, 90),
    head_dim=st.integers(1, 70),
    sink=st.integers(0, 99),
    window=st.integers(0, 99),
    bounds=st.lists(st.tuples(st.integers(-3, 95), st.integers(-3, 95)), min_size=2, max_size=2),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_any_shape_padding_and_forced_tokens(
    batch: int,
    num_kv_heads: int,
    num_tokens: int,
    head_dim: int,
    sink: int,
    window: int,
    bounds: list[tuple[int, int]],
    index_dtype: torch.dtype,
) -> None:
    args = draw(batch=batch, num_kv_heads=num_kv_heads, num_tokens=num_tokens, head_dim=head_dim)
    on_device = torch.tensor(bounds[:batch], dtype=index_dtype, device=DEVICE)
    check(args._replace(sink=sink, window=window, bounds=on_device))


@pytest.mark.parametrize(
    "bounds",
    [
        pytest.param([[5, 100], [0, 33]], id="left-and-right"),
        pytest.param([[7, 7], [30, 9]], id="no-real-token"),
        pytest.param([[-4, 200], [101, 150]], id="beyond-the-tensor"),
    ],
)
def test_padding_neither_counts_nor_scores(bounds: list[list[int]]) -> None:
    args = draw(sink=3, window=4, bounds=torch.tensor(bounds, device=DEVICE))
    scores = check(args)
    for b, (start, stop) in enumerate(bounds):
        args.k[b, :, : max(start, 0)] = NAN
        args.k[b, :, max(stop, start, 0) :] = NAN
    assert torch.equal(kernel.forward(args), scores)


def test_norms_are_clamped_as_torch_clamps_them() -> None:
    args = draw(batch=1, num_kv_heads=1, num_tokens=40)
    args.k[0, 0, 3] = 0.0
    args.k[0, 0, 4] *= 1e-10  # counts in full in the mean, and is clamped in the cosine
    args.k[0, 0, 5] *= 1e-14  # is clamped in both
    assert check(args)[0, 0, 3] == 0.0
    args.k.zero_()
    assert check(args).eq(0).all()


def test_strides_do_not_matter() -> None:
    args = draw(num_tokens=81, head_dim=24, sink=1, window=2)
    expected, k = kernel.forward(args), args.k
    views = {
        "as a projection leaves it": k.transpose(1, 2).contiguous().transpose(1, 2),
        "half of a row": torch.cat([k, k], 3)[..., 24:],
        "channels apart": k.transpose(2, 3).contiguous().transpose(2, 3),
    }
    for name, view in views.items():
        assert torch.equal(kernel.forward(args._replace(k=view)), expected), name


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_reaches_the_scores_of_its_head_only() -> None:
    args = draw(num_tokens=40, sink=2)
    clean = kernel.forward(args)
    args.k[0, 1, 30, 5], args.k[1, 0, 20, 1] = NAN, INF
    scores = check(args)
    spoilt = torch.tensor([[False, True], [True, False]], device=DEVICE)
    assert scores[spoilt][:, 2:].isnan().all()
    assert (scores[spoilt][:, :2] == INF).all()
    assert torch.equal(scores[~spoilt], clean[~spoilt])


def test_the_same_bits_every_time() -> None:
    args = draw(num_tokens=300, head_dim=64)
    assert torch.equal(kernel.forward(args), kernel.forward(args))


@pytest.mark.usefixtures("triton_backend")
def test_the_public_op_runs_it() -> None:
    args = draw(num_tokens=35, sink=2, window=3, bounds=torch.tensor([[0, 30], [4, 35]], device=DEVICE))
    actual = ops.key_similarity(args.k, sink=args.sink, window=args.window, bounds=args.bounds)
    assert torch.equal(actual, kernel.forward(args))


def test_a_row_too_long_for_a_tile_is_declined() -> None:
    assert kernel.unsupported(draw(batch=1, num_tokens=1, head_dim=4096)) is None
    assert "4097" in str(kernel.unsupported(draw(batch=1, num_tokens=1, head_dim=4097)))
