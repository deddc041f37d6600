"""The config of a compressor: what it refuses, and what comes back from disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from condense_core.compressor.config import CONFIG_NAME, MAX_RATIO, CompressorConfig, check_ratio, num_kept

GOOD = {"method": "pool", "d_model": 48, "encoder_layers": 2}
FULL = CompressorConfig(
    method="pool",
    d_model=48,
    encoder_layers=2,
    causal=False,
    ratios=(2, 8),
    num_heads=4,
    halo=1,
    window_queries=True,
    mlp_hidden=96,
    segment_tokens=512,
    lora_rank=4,
    lora_alpha=8.0,
    model_id="maker/model",
    model_revision="main",
)


def test_round_trip(tmp_path: Path) -> None:
    FULL.save(tmp_path)
    assert CompressorConfig.load(tmp_path) == FULL
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["format_version"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "pools"}, "method: got 'pools', expected one of pool, mixed, select, mean, memory"),
        ({"d_model": 0}, "d_model: got 0, expected an integer of at least 1"),
        ({"d_model": 48.0}, "d_model: got 48.0"),
        ({"encoder_layers": -1}, "encoder_layers: got -1, expected an integer of at least 0"),
        ({"encoder_layers": True}, "encoder_layers: got True"),
        ({"halo": -1}, "halo: got -1"),
        ({"mlp_hidden": None}, "mlp_hidden: got None"),
        ({"segment_tokens": -5}, "segment_tokens: got -5"),
        ({"lora_rank": "8"}, "lora_rank: got '8'"),
        ({"num_heads": 5}, "num_heads: got 5, expected a divisor of d_model=48"),
        ({"ratios": (4, 0)}, "ratio: got 0"),
        ({"method": "memory"}, "segment_tokens: got 0, expected at least 1 for the method 'memory'"),
    ],
)
def test_bad_values(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompressorConfig(**(GOOD | changes))


@pytest.mark.parametrize("ratio", [True, "4", None, 2 + 0j])
def test_a_ratio_of_another_type(ratio: object) -> None:
    with pytest.raises(TypeError, match=r"ratio: got .* expected a number from 1 to 1024"):
        check_ratio(ratio)


@pytest.mark.parametrize("ratio", [0, -1, MAX_RATIO + 1, 0.5, 1024.5, float("nan"), float("inf")])
def test_a_ratio_out_of_range(ratio: float) -> None:
    with pytest.raises(ValueError, match=f"ratio: got {ratio}, expected a number from 1 to 1024"):
        check_ratio(ratio)
    with pytest.raises(ValueError, match=f"ratio: got {ratio}, expected an integer from 1 to 1024"):
        check_ratio(ratio, "pool")


def test_the_bounds_of_a_ratio() -> None:
    assert (check_ratio(1), check_ratio(MAX_RATIO)) == (1, MAX_RATIO)


def test_a_fraction_is_for_methods_that_select() -> None:
    assert check_ratio(2.5, "select") == 2.5
    with pytest.raises(ValueError, match=r"ratio: got 2.5, expected an integer from 1 to 1024 for the method 'pool'"):
        check_ratio(2.5, "pool")
    assert CompressorConfig(**(GOOD | {"method": "select", "ratios": (2.5,)})).ratios == (2.5,)
    with pytest.raises(ValueError, match=r"ratio: got 2.5, expected an integer"):
        CompressorConfig(**(GOOD | {"ratios": (2.5,)}))


@pytest.mark.parametrize("method", [None, "select", "pool"])
def test_a_float_without_decimals_is_the_integer(method: str | None) -> None:
    assert isinstance(check_ratio(4.0, method), int)


@pytest.mark.parametrize(
    ("count", "ratio", "kept"), [(10, 2.5, 4), (11, 2.5, 5), (33, 3.3, 10), (7, 1.4, 5), (9, 4, 3)]
)
def test_counts_are_exact_in_the_decimals_that_were_given(count: int, ratio: float, kept: int) -> None:
    """33 / 3.3 is 10 and a little in binary arithmetic, whose ceiling is 11."""
    assert num_kept(count, ratio) == kept


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format_version": 2}, "format_version 2, this release reads 1"),
        ({"format_version": ...}, "format_version"),
        ({"temperature": 1, "colour": 2}, "unknown entries colour, temperature"),
        ({"method": ...}, "method"),
        ({"method": "pools"}, "method: got 'pools'"),
        ({"ratios": 4}, "not iterable"),
        ({"ratios": "24"}, "ratio: got '2'"),
        ({"ratios": [4, 4096]}, "ratio: got 4096"),
    ],
)
def test_a_file_with_other_entries_is_refused_by_name(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    FULL.save(tmp_path)
    path = tmp_path / CONFIG_NAME
    entries = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in entries.items() if value is not ...}))
    with pytest.raises(ValueError, match=reason) as caught:
        CompressorConfig.load(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"pool"', b"\xff\xfe"])
def test_a_file_that_is_no_config(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / CONFIG_NAME
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a compressor config") as caught:
        CompressorConfig.load(tmp_path)
    assert str(path) in str(caught.value)


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a compressor checkpoint folder"):
        CompressorConfig.load(tmp_path)
    with pytest.raises(ValueError, match="expected a compressor checkpoint folder"):
        CompressorConfig.load(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="expected a compressor checkpoint folder"):
        CompressorConfig.load(tmp_path / "file")
