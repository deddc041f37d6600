"""expected_attention on Triton: kernels/expected_attention.py against the specification in ops/reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core import ops
from condense_core.kernels import expected_attention as kernel
from condense_core.ops import reference
from condense_core.ops.arguments import ExpectedAttentionArgs

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INF, NAN = float("inf"), float("nan")

# Relative, since the scores of a long sequence are small. fp32: another order of summation, through an exponential of
# logits of order 5. 16 bits: k enters both with the same bits, but a GPU multiplies in TF32, off by 2^-9 of a quadratic
# term of order 1 in the logit; the interpreter multiplies in fp32.
TOLERANCES = {
    torch.float32: {"atol": 1e-7, "rtol": 2e-5},
    torch.float16: {"atol": 1e-6, "rtol": 1e-2},
    torch.bfloat16: {"atol": 1e-6, "rtol": 1e-2},
}


def draw(
    *,
    batch: int = 1,
    num_kv_heads: int = 2,
    group: int = 2,
    num_tokens: int = 70,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    rotated: bool = True,
    **changes: Any,
) -> ExpectedAttentionArgs:
    """Arguments of the op, with a mean rotation if `rotated`."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    num_heads = num_kv_heads * group
    root = normal(batch, num_heads, head_dim, head_dim) / head_dim**0.5
    angle = normal(head_dim // 2).repeat(2)
    return ExpectedAttentionArgs(
        k=normal(batch, num_kv_heads, num_tokens, head_dim).to(dtype),
        v=normal(batch, num_kv_heads, num_tokens, head_dim).to(dtype),
        mu=normal(batch, num_heads, head_dim),
        cov=root @ root.mT,
        mean_cos=0.8 * angle.cos() if rotated else None,
        mean_sin=0.8 * angle.sin() if rotated else None,
        scale=head_dim**-0.5,
        epsilon=0.0,
        sink=4,
        bounds=None,
    )._replace(**changes)


def check(args: ExpectedAttentionArgs) -> Tensor:
    """The kernels' scores, after they were found right."""
    scores = kernel.forward(args)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, reference.expected_attention(*args), **TOLERANCES[args.k.dtype])
    return scores


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"num_tokens": 150}, id="several-tiles-and-a-short-one"),
        pytest.param({"batch": 2, "num_tokens": 33, "head_dim": 20}, id="head_dim-no-power-of-two"),
        pytest.param({"num_tokens": 3}, id="only-sinks"),
        pytest.param({"num_tokens": 0}, id="no-tokens"),
        pytest.param({"num_kv_heads": 3, "group": 1}, id="mha"),
        pytest.param({"num_kv_heads": 1, "group": 3}, id="a-group-of-three"),
        pytest.param({"num_kv_heads": 1, "num_tokens": 20, "head_dim": 7, "rotated": False}, id="head_dim-odd"),
        pytest.param({"num_kv_heads": 1, "num_tokens": 20, "head_dim": 136}, id="covariance-in-pieces"),
    ],
)
def test_shapes(shape: dict[str, Any], dtype: torch.dtype) -> None:
    check(draw(**shape, dtype=dtype))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"v": None}, id="no-values"),
        pytest.param({"cov": None}, id="no-covariance"),
        pytest.param({"mean_cos": None, "mean_sin": None}, id="no-rotation"),
        pytest.param({"epsilon": 0.01, "scale": -0.3, "sink": 0}, id="other-numbers"),
    ],
)
def test_what_may_be_left_out_or_changed(changes: dict[str, Any]) -> None:
    check(draw(**changes))


@settings(max_examples=10, deadline=None)
@given(num_tokens=st.integers(1, 80), sink=st.integers(0, 6), head_dim=st.integers(1, 12), group=st.integers(1, 3))
def test_without_values_the_scores_are_shares_of_one(num_tokens: int, sink: int, head_dim: int, group: int) -> None:
    args = draw(num_tokens=num_tokens, num_kv_heads=1, group=group, head_dim=2 * head_dim, v=None, sink=sink)
    scores = check(args)[:, :, min(sink, num_tokens) :]
    if num_tokens > sink:
        torch.testing.assert_close(scores.sum(-1), torch.ones_like(scores[..., 0]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_padding_neither_counts_nor_scores(index_dtype: torch.dtype) -> None:
    # Left, right, fewer real tokens than sinks, none, and bounds outside of the tensor.
    bounds = torch.tensor([[7, 50], [0, 33], [10, 13], [20, 20], [-3, 99]], dtype=index_dtype, device=DEVICE)
    args = draw(batch=5, num_tokens=50, bounds=bounds)
    for tensor in (args.k, args.v):
        tensor[0, :, :7], tensor[1, :, 33:] = NAN, INF
        tensor[2, :, :10] = tensor[2, :, 13:] = tensor[3] = NAN
    scores = check(args)
    assert (scores[0, :, :7] == -INF).all()
    assert (scores[0, :, 7:11] == INF).all()
    assert scores[0, :, 11:].isfinite().all()
    assert (scores[2, :, 10:13] == INF).all()
    assert (scores[3] == -INF).all()


def test_large_logits_do_not_overflow() -> None:
    args = draw(num_tokens=150, v=None)
    scores = check(args._replace(mu=300.0 * args.mu))
    assert scores[:, :, 4:].isfinite().all()


@pytest.mark.parametrize("bad", [NAN, INF], ids=["nan", "inf"])
def test_what_is_not_finite_stays_with_its_head(bad: float) -> None:
    args = draw()
    clean = kernel.forward(args)
    k, v = args.k.clone(), args.v.clone()
    k[0, 1, 20, 3] = v[0, 1, 20, 3] = bad
    scores = kernel.forward(args._replace(k=k))
    assert torch.equal(scores[:, 0], clean[:, 0])
    assert scores[:, 1, 4:].isnan().all(), "a softmax over all tokens of the head"
    scores = kernel.forward(args._replace(v=v))
    others = [i for i in range(70) if i != 20]
    assert torch.equal(scores[:, :, others], clean[:, :, others])


def test_strided_inputs_and_the_same_bits_every_time() -> None:
    args = draw()
    expected = kernel.forward(args)
    for change in (
        {},
        {"k": args.k.transpose(1, 2).contiguous().transpose(1, 2)},
        {"v": args.v.mT.contiguous().mT},
        {"cov": args.cov.mT.contiguous().mT},
    ):
        assert torch.equal(kernel.forward(args._replace(**change)), expected), list(change)


@pytest.mark.usefixtures("triton_backend")
def test_through_the_public_op() -> None:
    args = draw()
    torch.testing.assert_close(
        ops.expected_attention(**args._asdict()), reference.expected_attention(*args), **TOLERANCES[torch.float32]
    )
    assert "more than 256" in str(kernel.unsupported(draw(num_tokens=1, head_dim=257, num_kv_heads=1, rotated=False)))
