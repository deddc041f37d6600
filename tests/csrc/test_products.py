"""The CPU kernels of window_scores and value_projection_norm, which are made of matrix products."""

import pytest
import torch
from torch import Tensor

from condense_core.ops import reference
from condense_core.ops.arguments import (
    ExpectedAttentionArgs,
    NonCausalChunksArgs,
    QueryMomentsArgs,
    ValueProjectionNormArgs,
    WindowScoresArgs,
)
from condense_core.ops.cpu.expected_attention import expected_attention
from condense_core.ops.cpu.non_causal_chunks import non_causal_chunks
from condense_core.ops.cpu.query_moments import query_moments
from condense_core.ops.cpu.value_projection_norm import value_projection_norm
from condense_core.ops.cpu.window_scores import window_scores

# Relative to the largest score: products of the inputs as they are, sums in fp32, so that the dtype matters little. A
# probability carries the error of its logit, which is of the size of a few units.
TOLERANCES = {"rtol": 2e-5, "atol": 1e-7}

# B, G, group, w, N, D: tails in every direction, several blocks of 256 keys and of 256 queries, one token.
SHAPES = [
    (1, 2, 2, 3, 40, 16),
    (2, 1, 3, 8, 33, 20),
    (1, 1, 5, 64, 300, 8),
    (1, 2, 1, 1, 1, 4),
    (2, 2, 4, 7, 530, 80),
    (1, 1, 1, 2, 17, 129),
    (1, 1, 1, 5, 5, 1),
]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_window_scores(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, heads, group, window, tokens, dim = shape
    q, k = draw(batch, heads * group, window, dim, dtype=dtype), draw(batch, heads, tokens, dim, seed=1, dtype=dtype)
    several = torch.tensor([[1, tokens], [0, tokens - 2], [-3, 99999]])[:batch]
    for bounds in (None, several, several.int().clamp(max=window)):
        for kernel_size, scale in ((5, dim**-0.5), (1, -0.3)):
            actual = window_scores(WindowScoresArgs(q, k, scale, kernel_size, bounds))
            expected = reference.window_scores(q.double(), k.double(), scale, kernel_size, bounds)
            torch.testing.assert_close(actual.double(), expected, **TOLERANCES)


@pytest.mark.usefixtures("isa")
def test_window_scores_of_a_cache_too_long_to_be_scored_at_once(dtype: torch.dtype) -> None:
    q, k = draw(1, 6, 70, 64, dtype=dtype), draw(1, 2, 9_000, 64, seed=1, dtype=dtype)
    for bounds in (None, torch.tensor([[300, 8_900]])):
        actual = window_scores(WindowScoresArgs(q, k, 0.125, 5, bounds))
        expected = reference.window_scores(q.double(), k.double(), 0.125, 5, bounds)
        torch.testing.assert_close(actual.double(), expected, **TOLERANCES)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_projection_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, heads, group, window, tokens, dim = shape
    v, w_o = draw(batch, heads, tokens, dim, dtype=dtype), draw(40 * window, heads * group * dim, seed=1, dtype=dtype)
    for bounds in (None, torch.tensor([[1, tokens], [0, tokens - 2]])[:batch]):
        actual = value_projection_norm(ValueProjectionNormArgs(v, w_o, bounds))
        expected = reference.value_projection_norm(v.double(), w_o.double(), bounds)
        torch.testing.assert_close(actual.double(), expected, **TOLERANCES)


@pytest.mark.usefixtures("isa")
def test_strides_and_nan(dtype: torch.dtype) -> None:
    q, k = draw(2, 6, 4, 32, dtype=dtype), draw(2, 50, 3, 32, seed=1, dtype=dtype).transpose(1, 2)
    expected = window_scores(WindowScoresArgs(q, k.contiguous(), 0.2, 5, None))
    assert torch.equal(window_scores(WindowScoresArgs(q, k, 0.2, 5, None)), expected)
    bad = k.clone()
    bad[1, 2, 7, 3] = float("nan")
    actual = window_scores(WindowScoresArgs(q, bad, 0.2, 5, None))
    wanted = reference.window_scores(q, bad, 0.2, 5)
    assert torch.equal(actual.isnan(), wanted.isnan())
    assert torch.equal(actual[0], expected[0])
    hidden = torch.tensor([[0, 50], [8, 50]])  # the same token, as padding
    assert not window_scores(WindowScoresArgs(q, bad, 0.2, 5, hidden)).isnan().any()
    w_o = draw(70, 6 * 32, seed=2, dtype=dtype)
    norms = value_projection_norm(ValueProjectionNormArgs(bad, w_o, None))
    assert norms.isnan().nonzero().tolist() == [[1, 2, 7]]


def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    q, k, w_o = draw(1, 6, 40, 64, dtype=dtype), draw(1, 3, 700, 64, dtype=dtype), draw(200, 6 * 64, dtype=dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            scores = window_scores(WindowScoresArgs(q, k, 0.125, 5, None))
            results.append((scores, value_projection_norm(ValueProjectionNormArgs(k, w_o, None))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_non_causal_chunks(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, heads, group, window, tokens, dim = shape
    q, k = draw(batch, heads * group, tokens, dim, dtype=dtype), draw(batch, heads, tokens, dim, seed=1, dtype=dtype)
    for bounds in (None, torch.tensor([[1, tokens], [0, tokens - 2]])[:batch]):
        for chunk in (window, 100):
            actual = non_causal_chunks(NonCausalChunksArgs(q, k, min(chunk, tokens), dim**-0.5, bounds))
            expected = reference.non_causal_chunks(q.double(), k.double(), min(chunk, tokens), dim**-0.5, bounds)
            torch.testing.assert_close(actual.double(), expected, **TOLERANCES)
    none = non_causal_chunks(NonCausalChunksArgs(q[:, :, :0], k[:, :, :0], 1, 1.0, None))
    assert none.shape == (batch, heads, 0)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_query_moments_and_expected_attention(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, heads, group, _, tokens, dim = shape
    q = draw(batch, heads * group, tokens, dim, dtype=dtype) + 3  # a mean that is large beside the deviations
    k, v = (draw(batch, heads, tokens, dim, seed=seed, dtype=dtype) for seed in (1, 2))
    angles = (
        torch.arange(tokens)[:, None] * torch.rand(dim // 2, generator=torch.Generator().manual_seed(5))
        if dim % 2 == 0
        else None
    )
    cos, sin = (
        (None, None) if angles is None else (1.2 * f(torch.cat([angles, angles], 1)) for f in (torch.cos, torch.sin))
    )
    for bounds in (None, torch.tensor([[1, tokens], [0, tokens - 2]])[:batch]):
        for sink in (0, 2):
            tables = () if cos is None or sin is None else (cos[None], sin[None])
            mu, cov = query_moments(QueryMomentsArgs(q, *(tables or (None, None)), sink, bounds))
            wanted = reference.query_moments(q.double(), *(t.double() for t in tables), sink=sink, bounds=bounds)
            torch.testing.assert_close(mu.double(), wanted[0], rtol=2e-5, atol=2e-5)
            # Operands of 16-bit queries keep 2^-16 of themselves, csrc/cpu/split.h.
            error = 2e-5 if dtype == torch.float32 else 2**-15
            torch.testing.assert_close(cov.double(), wanted[1], rtol=2e-5, atol=error * float(wanted[1].max()))
            mean = (None, None) if not tables else (tables[0][0, 0], tables[1][0, 0])
            for some_v, some_cov, epsilon in ((v, cov, 0.0), (None, None, 0.0), (v, cov, 0.01)):
                rest = (dim**-0.5, epsilon, sink, bounds)
                actual = expected_attention(ExpectedAttentionArgs(k, some_v, mu, some_cov, *mean, *rest))
                doubles = (None if t is None else t.double() for t in (k, some_v, mu, some_cov, *mean))
                expected = reference.expected_attention(*doubles, *rest)
                torch.testing.assert_close(actual.double(), expected, rtol=2e-4, atol=1e-7)


@pytest.mark.usefixtures("isa")
def test_infinities_go_where_the_reference_has_them(dtype: torch.dtype) -> None:
    v, w_o = draw(1, 1, 5, 16, dtype=dtype), draw(40, 32, seed=1, dtype=dtype)
    v[0, 0, 2, 3] = float("inf")
    actual = value_projection_norm(ValueProjectionNormArgs(v, w_o, None))
    assert torch.equal(actual.isinf(), reference.value_projection_norm(v, w_o).isinf())
    assert not actual.isnan().any()
    q = draw(1, 2, 300, 8, dtype=dtype)
    q[0, 0, 0, 1] = float("inf")
    q[0, 1, 290, 7] = float("nan")
    wanted = reference.query_moments(q.float(), sink=0)
    for mine, theirs in zip(query_moments(QueryMomentsArgs(q, None, None, 0, None)), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-5, equal_nan=True)
    k, mu = draw(1, 1, 300, 8, seed=2, dtype=dtype), draw(1, 2, 8, seed=3)
    cov = torch.eye(8).expand(1, 2, 8, 8).clone()
    for place in (k[0, 0, 200], cov[0, 1, 2]):
        place[3] = float("-inf")
        actual = expected_attention(ExpectedAttentionArgs(k, None, mu, cov, None, None, 0.5, 0.0, 4, None))
        wanted_scores = reference.expected_attention(k.float(), None, mu, cov, scale=0.5, sink=4)
        assert torch.equal(actual.isnan(), wanted_scores.isnan())
        place[3] = 1
