"""Compressors that ship for a public model: found by the weights that they were trained for, under any name."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from condense_core.compressor.condenser import Condenser
from condense_core.compressor.config import CompressorConfig
from condense_core.decoder import embedded
from condense_core.decoder.identity import model_digest
from condense_core.decoder.model import load_decoder


@pytest.fixture
def bare(tiny_model_path: Path, tmp_path: Path) -> Path:
    """The tiny model without a compressor of its own."""
    folder = tmp_path / "tiny-public"
    shutil.copytree(tiny_model_path, folder, ignore=shutil.ignore_patterns("condense"))
    return folder


@pytest.fixture
def shipped(bare: Path, tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of shipped compressors with a `pool` that was trained for the tiny model."""
    import torch

    models = tmp_path / "package" / "_models"
    checkpoint = models / "tiny-public-condense" / "pool"
    shutil.copytree(tiny_model_path / "condense" / "pool", checkpoint)
    model, _ = load_decoder(bare, dtype=torch.float32)
    config = replace(CompressorConfig.load(checkpoint), model_id="tiny-public", model_digest=model_digest(model))
    config.save(checkpoint)
    monkeypatch.setattr(embedded, "_PACKAGE", models.parent)
    return checkpoint


def test_without_one_the_method_that_needs_no_training_is_the_default(bare: Path) -> None:
    assert Condenser.from_pretrained(bare, device="cpu").config.method == "select"


def test_it_is_found_for_its_weights_under_any_name(bare: Path, shipped: Path, tmp_path: Path) -> None:
    for name in ("tiny-public", "renamed"):
        bare = bare.rename(tmp_path / name)
        condenser = Condenser.from_pretrained(bare, device="cpu")
        assert (condenser.config.method, condenser.model_id) == ("pool", "tiny-public")
        assert condenser.config.ratios == CompressorConfig.load(shipped).ratios


def test_a_method_that_does_not_ship_is_untrained_as_before(bare: Path, shipped: Path) -> None:
    assert Condenser.from_pretrained(bare, method="mean", device="cpu").config.ratios == ()


def test_the_model_folder_s_own_compressor_comes_first(bare: Path, shipped: Path, tiny_model_path: Path) -> None:
    own = bare / "condense" / "pool"
    shutil.copytree(tiny_model_path / "condense" / "pool", own)
    replace(CompressorConfig.load(own), model_id="its own").save(own)
    assert Condenser.from_pretrained(bare, device="cpu").model_id == "its own"


def test_other_weights_get_none_of_it(bare: Path, shipped: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(bare / "model.safetensors")
    save_file({name: torch.ones_like(value) for name, value in weights.items()}, bare / "model.safetensors")
    assert Condenser.from_pretrained(bare, device="cpu").config.method == "select"
