"""Copies are found in another order, scale, number or with noise; two who compress by themselves are none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from condense_core.compressor.condenser import Condenser
from condense_core.decoder.embedded import embedded_model_path
from condense_core.neurons.incentive import copies
from condense_core.neurons.incentive.copies import ALIKE, shares, similarity
from condense_core.tasks.sources import open_source

WIDTH = 384


def parts_of(answers: dict[str, Tensor], seed: int = 0) -> dict[str, float]:
    """The shares of answers of one score."""
    return shares(answers, dict.fromkeys(answers, 0.7), seed=seed)


def answer(seed: int, rows: int = 64, width: int = WIDTH) -> Tensor:
    """Random rows around a common direction, as soft tokens are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator) + 3 * torch.ones(width) / width**0.5


def noisy(original: Tensor, share: float) -> Tensor:
    noise = torch.randn(original.shape, generator=torch.Generator().manual_seed(99))
    centred = original - original.mean(0)
    return original + noise * share * centred.norm() / noise.norm()


DISGUISES: dict[str, Callable[[Tensor], Tensor]] = {
    "the same": lambda x: x.clone(),
    "another order": lambda x: x[torch.randperm(len(x), generator=torch.Generator().manual_seed(5))],
    "another scale": lambda x: 1000 * x,
    "a tiny scale": lambda x: 1e-30 * x,
    "noise": lambda x: noisy(x, 0.2),
    "half of the rows": lambda x: x[::2],
    "rows added": lambda x: torch.cat([x, answer(77, 20)]),
    "in bfloat16": lambda x: x.bfloat16(),
    "all of it": lambda x: 0.1 * noisy(x.flip(0), 0.15)[1:],
}


@pytest.mark.parametrize("disguise", DISGUISES)
def test_a_disguised_copy_shares_one_reward(disguise: str) -> None:
    original = answer(0)
    copy = DISGUISES[disguise](original)
    assert similarity(original, copy) >= ALIKE
    assert parts_of({"a": original, "b": copy, "c": answer(1)}) == {"a": 0.5, "b": 0.5, "c": 1.0}


def test_strangers_keep_their_own_whatever_their_number_and_order() -> None:
    answers = {f"{i:02}": answer(i) for i in range(12)}
    assert set(parts_of(answers).values()) == {1.0}
    backwards = parts_of(dict(reversed(answers.items())))
    assert backwards == parts_of(answers)


def test_copies_of_copies_are_one_group() -> None:
    first = answer(0)
    found = parts_of({str(i): noisy(first, 0.05 * i) for i in range(5)} | {"other": answer(9)})
    assert found == pytest.approx({**{str(i): 0.2 for i in range(5)}, "other": 1.0})


def test_copies_are_found_in_sketches_of_wide_answers() -> None:
    wide = answer(0, width=2048)
    found = parts_of({"a": wide, "b": noisy(wide.flip(0), 0.2), "c": answer(1, width=2048)}, seed=7)
    assert found == {"a": 0.5, "b": 0.5, "c": 1.0}


def test_the_search_finds_what_comparing_all_pairs_finds() -> None:
    """Of sixteen groups of four, each a disguise as far as it may go, whatever the secret."""
    answers: dict[str, Tensor] = {}
    for group in range(16):
        original = answer(group, rows=40 + group, width=WIDTH)
        made = [original, noisy(original.flip(0), 0.22), 3 * original[::2], noisy(original, 0.2)[5:].half()]
        answers |= {f"{group} {i}": one for i, one in enumerate(made)}
    for seed in range(5):
        assert set(parts_of(answers, seed=seed).values()) == {0.25}


def test_all_pairs_of_many_strangers_are_looked_at_without_comparing_them(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    own = copies._alike
    monkeypatch.setattr(copies, "_alike", lambda *pair: compared.append(pair) or own(*pair))
    answers = {f"{i:02}": answer(i) for i in range(32)} | {"copy": noisy(answer(0), 0.1)}
    found = parts_of(answers)
    assert {name for name, share in found.items() if share < 1} == {"00", "copy"}
    assert len(compared) == 1


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_answers_of_few_rows_are_compared_too(rows: int) -> None:
    one, other = answer(0, rows), answer(1, rows)
    assert similarity(one, 2 * one) == pytest.approx(1)
    assert similarity(one, other) < ALIKE


def test_zeros_and_other_widths_are_like_nothing() -> None:
    zeros = torch.zeros(8, WIDTH)
    assert similarity(zeros, answer(0)) <= 0.0
    assert similarity(answer(0, width=8), answer(0, width=16)) == -1.0


def test_huge_values_do_not_overflow() -> None:
    huge = answer(0) * (1e38 / answer(0).abs().max())
    assert similarity(huge, answer(0)) == pytest.approx(1, abs=1e-4)


def test_a_group_shares_by_its_scores_and_gets_no_more_than_its_best() -> None:
    first = answer(0)
    answers = {"best": first, "worse": noisy(first, 0.2), "worthless": noisy(first, 0.1), "other": answer(1)}
    scores = {"best": 0.6, "worse": 0.2, "worthless": 0.0, "other": 0.3}
    found = shares(answers, scores)
    assert found == pytest.approx({"best": 0.75, "worse": 0.25, "worthless": 0.0, "other": 1.0})
    assert sum(found[name] * scores[name] for name in ("best", "worse", "worthless")) <= scores["best"]
    assert shares(answers, dict.fromkeys(answers, 0.0)) == dict.fromkeys(answers, 0.0)


# -- what compressors make ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made() -> dict[str, Tensor]:
    """Answers of the embedded model's compressors to one text."""
    text = open_source(None).document(0)[:2000]
    condensers = {name: Condenser.from_pretrained(embedded_model_path(), method=name) for name in METHODS}
    found = {name: condenser.compress(text, 4).embeds for name, condenser in condensers.items()}
    return found | {"coarser": condensers["pool"].compress(text, 8).embeds}


METHODS = ("pool", "memory", "select")


def spread(original: Tensor, share: float, seed: int) -> Tensor:
    """A copy under noise of this share of its spread."""
    noise = torch.randn(original.shape, generator=torch.Generator().manual_seed(seed))
    return original + share * original.std() * noise


def test_compressors_of_different_kinds_are_strangers(made: dict[str, Tensor]) -> None:
    assert set(parts_of({name: made[name] for name in METHODS}).values()) == {1.0}


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 1.0])
def test_a_copy_under_noise_is_one_as_long_as_the_llm_can_read_it(made: dict[str, Tensor], share: float) -> None:
    answers = {name: made[name] for name in METHODS} | {"copy": spread(made["pool"], share, 1)}
    assert parts_of(answers) == {"pool": 0.5, "copy": 0.5, "memory": 1.0, "select": 1.0}


@pytest.mark.parametrize("share", [0.25, 0.5, 0.7])
def test_copies_under_noise_are_alike_without_what_they_are_copied_from(made: dict[str, Tensor], share: float) -> None:
    copies = {str(n): spread(made["pool"], share, n) for n in range(4)}
    found = parts_of(copies | {"memory": made["memory"], "select": made["select"]})
    assert found == dict.fromkeys(copies, 0.25) | {"memory": 1.0, "select": 1.0}


def test_one_checkpoint_at_two_ratios_is_one(made: dict[str, Tensor]) -> None:
    assert similarity(made["pool"], made["coarser"]) >= ALIKE


def test_noise_in_the_main_directions_alone_is_found_in_all_of_them(made: dict[str, Tensor]) -> None:
    centred = made["pool"] - made["pool"].mean(0)
    main = torch.linalg.svd(centred, full_matrices=False).Vh[:32]
    noise = torch.randn(len(centred), 32, generator=torch.Generator().manual_seed(1)) @ main
    copy = made["pool"] + 0.6 * noise * centred.norm() / noise.norm()
    assert parts_of({"a": made["pool"], "b": copy, "c": made["memory"]}) == {"a": 0.5, "b": 0.5, "c": 1.0}
