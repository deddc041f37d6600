"""QFilter: calibration and files of filters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from condense_core.pruning import methods
from condense_core.pruning.methods.qfilter import calibrate, load_filters, save_filters
from condense_testing.pruning.method_cases import (
    HEAD_DIM,
    LAYERS,
    make_case,
)


def test_filters_point_away_from_the_queries() -> None:
    """A key along the queries scores higher than one against them; the direction is that of an SVD."""
    case = make_case(8, 2)
    queries = case.q + 3.0
    filters = calibrate([queries] * LAYERS, 2)
    expected = torch.zeros(2, HEAD_DIM)
    for h in range(8):
        x = torch.cat([queries[0, h], queries[1, h]])
        direction = torch.linalg.svd(x, full_matrices=False).Vh[0]
        expected[h // 4] -= direction * (x @ direction).mean().sign() / 4
    torch.testing.assert_close(filters, expected.expand(LAYERS, -1, -1), rtol=1e-4, atol=1e-4)
    along = queries.mean((0, 2)).unflatten(0, (2, -1)).mean(1)  # [G, D]
    k = torch.stack([along, -along], 1).unsqueeze(0)
    scores = methods.QFilter(keep=0.5, filters=filters).score(None, queries, k, k, case.ctx)
    assert (scores[..., 0] > 0).all()
    assert (scores[..., 1] < 0).all()


def test_filters_are_stored_as_safetensors(tmp_path: Path) -> None:
    filters = torch.randn(LAYERS, 2, HEAD_DIM)
    save_filters(filters, tmp_path / "filters.safetensors")
    assert torch.equal(load_filters(tmp_path / "filters.safetensors"), filters)
    stored = methods.QFilter(keep=0.5, filters=tmp_path / "filters.safetensors")
    given = methods.QFilter(keep=0.5, filters=filters)
    assert stored == given
    assert hash(stored) == hash(given)
    assert given != methods.QFilter(keep=0.5, filters=filters + 1)
    assert repr(given) == f"QFilter(keep=0.5, filters=[{LAYERS}, 2, {HEAD_DIM}])"


@pytest.mark.parametrize(
    ("filters", "error", "message"),
    [
        (None, TypeError, r"QFilter: filters is NoneType, expected a float tensor"),
        (torch.zeros(1, 2, 16, dtype=torch.int64), TypeError, r"QFilter: filters is torch.int64, expected a float"),
        (torch.zeros(2, 16), ValueError, r"QFilter: filters has shape \[2, 16\], expected \[L, G, D\]"),
        ("nowhere.safetensors", ValueError, r"QFilter: filters is 'nowhere.safetensors', expected the path"),
    ],
)
def test_bad_filters(filters: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        methods.QFilter(keep=0.5, filters=filters)


def test_filters_are_never_unpickled(tmp_path: Path) -> None:
    torch.save({"q_filters": torch.zeros(3, 2, 16)}, tmp_path / "filters.pt")
    with pytest.raises(ValueError, match="which is no safetensors file"):
        load_filters(tmp_path / "filters.pt")


def test_filters_of_another_model() -> None:
    case = make_case()
    method = methods.QFilter(keep=0.5, filters=torch.zeros(LAYERS, 4, HEAD_DIM))
    with pytest.raises(ValueError, match=r"filters has shape \[3, 4, 16\], expected \[L, G, D\] = \[3, 2, 16\]"):
        method.score(None, case.q, case.k, case.v, case.ctx)


@pytest.mark.parametrize(
    ("queries", "kv_heads", "error", "message"),
    [
        (torch.zeros(2, 8, 5, 16), 2, TypeError, "queries is Tensor, expected a sequence"),
        ([], 2, TypeError, "queries is list, expected a sequence"),
        ([torch.zeros(5, 16)], 2, ValueError, r"queries\[0\] is \[5, 16\], expected a tensor \[H, T, D\]"),
        ([torch.zeros(8, 0, 16)], 2, ValueError, r"queries\[0\] is \[8, 0, 16\], expected a tensor"),
        ([torch.zeros(8, 5, 16)], 3, ValueError, r"num_kv_heads is 3, expected a divisor of queries\[0\]'s 8 heads"),
    ],
)
def test_calibrate_refuses(queries: Any, kv_heads: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        calibrate(queries, kv_heads)
