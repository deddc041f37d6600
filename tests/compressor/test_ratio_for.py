"""The ratio that keeps to a number of soft tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from condense_core.compressor.config import CompressorConfig, num_kept

SELECT = CompressorConfig(method="select", d_model=8, encoder_layers=1)
UNTRAINED = CompressorConfig(method="pool", d_model=8, encoder_layers=1)
TRAINED = CompressorConfig(method="pool", d_model=8, encoder_layers=1, ratios=(4, 2, 8))
MIXED = CompressorConfig(
    method="mixed", d_model=8, encoder_layers=1, ratios=(2, 4), window=8, mlp_hidden=4, residual=True
)


@given(st.integers(1, 100_000), st.integers(1, 4_096))
def test_select_gives_exactly_so_many_of_a_longer_text(tokens: int, most: int) -> None:
    if tokens > 1024 * most:
        return
    ratio = SELECT.check_served(SELECT.ratio_for(tokens, most))
    assert num_kept(tokens, ratio) == min(tokens, most)


@pytest.mark.parametrize("config", [UNTRAINED, TRAINED, MIXED])
@given(st.integers(10, 5_000), st.integers(1, 2_000))
def test_others_give_at_most_so_many_at_the_smallest_ratio_served(
    config: CompressorConfig, tokens: int, most: int
) -> None:
    try:
        ratio = config.check_served(config.ratio_for(tokens, most))
    except ValueError as error:
        assert str(error).startswith("max_soft_tokens: got")  # noqa: PT017
        largest = config.window or max(config.ratios, default=1024)
        assert num_kept(tokens, largest) > most
        return
    config.check_length(tokens, ratio)
    assert num_kept(tokens, ratio) <= most
    smaller = [r for r in config.ratios or range(1, 1025) if r < ratio] if config is not MIXED else []
    assert all(num_kept(tokens, r) > most for r in smaller)


@pytest.mark.parametrize("most", [0, -1, True, 2.5, "3"])
def test_what_is_no_number_of_soft_tokens_is_refused(most: object) -> None:
    with pytest.raises(ValueError, match="max_soft_tokens: got"):
        SELECT.ratio_for(100, most)  # type: ignore[arg-type]
