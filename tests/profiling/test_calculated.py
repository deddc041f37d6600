"""The calculated table of docs/encoder.md: what its function gives, and what a hand gives for Mistral-7B."""

from __future__ import annotations

from pathlib import Path

import pytest

from condense_core.profiling.calculated import CARDS, SHARE, cost, table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "encoder.md"
WIDTH, KEYS, MIDDLE, TOKENS = 4096, 1024, 14_336, 1750
LAYER = 2 * WIDTH * WIDTH + 2 * WIDTH * KEYS + 3 * WIDTH * MIDDLE  # weights of its linears


@pytest.mark.parametrize("layers", [8, 32])
def test_mistral_7b_by_hand(layers: int) -> None:
    found = cost(layers)
    assert found.tokens == TOKENS
    attention = 4 * WIDTH * TOKENS * (TOKENS + 1) // 2
    pooling = 4 * TOKENS * WIDTH + 438 * 2 * 2 * WIDTH * 2 * WIDTH  # 438 soft tokens through an MLP twice as wide
    assert found.flops == layers * (2 * LAYER * TOKENS + attention) + pooling
    by_layers = 2 * (layers * (LAYER + 2 * WIDTH) + 32_000 * WIDTH)
    assert by_layers < found.weight_bytes < by_layers + 0.2e9  # the head: two matrices of 4096 x 8192, and little more


def test_the_page_has_the_table_that_the_function_gives() -> None:
    _, _, behind = PAGE.read_text().partition("<!-- python -m condense_core.profiling.calculated -->\n")
    assert behind.partition("<!-- end -->")[0] == table(), "run python -m condense_core.profiling.calculated"


def test_what_the_page_says_of_the_slowest_card() -> None:
    assert list(CARDS.values()) == sorted(CARDS.values())
    slowest, whole = min(CARDS.values()), cost(32)
    assert whole.seconds(slowest) < 1
    assert cost(8).seconds(slowest) < 0.26
    assert whole.seconds(slowest) * SHARE == pytest.approx(0.36, abs=0.005)
    assert whole.weight_bytes + 2 * whole.activation_bytes < 15e9
