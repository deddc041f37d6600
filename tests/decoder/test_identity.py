"""The digest of a model's weights: one in every dtype and under every name, another for every change of weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from condense_core.compressor.condenser import Condenser
from condense_core.compressor.config import CompressorConfig
from condense_core.compressor.soft_tokens import SoftTokens, SoftTokensError
from condense_core.decoder.embedded import embedded_model_path
from condense_core.decoder.identity import mismatch, model_digest, same_weights
from condense_core.pruning import PrunedCache, SnapKV

Build = Callable[..., PreTrainedModel]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_checkpoint_of_32_bits_has_one_digest_in_whatever_dtype_it_is_loaded(
    build_model: Build, dtype: torch.dtype
) -> None:
    model = build_model(seed=1)
    assert same_weights(model_digest(model), model_digest(copy.deepcopy(model).to(dtype)))


def test_a_checkpoint_of_16_bits_has_one_digest_in_all_dtypes(tiny_model_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.bfloat16)
    digests = [model_digest(copy.deepcopy(model).to(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    assert all(same_weights(first, second) for first in digests for second in digests)


def test_every_weight_counts(build_model: Build) -> None:
    model = build_model("qwen2", seed=1)
    original = model_digest(model)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            before = parameter.clone()
            parameter.mul_(1.02)
            assert not same_weights(model_digest(model), original), name
            parameter.copy_(before)
    assert model_digest(model) == original


def test_name_and_path_do_not_count_and_added_tokens_do_not(build_model: Build) -> None:
    model = build_model(seed=1)
    original = model_digest(model)
    model.name_or_path = model.config._name_or_path = "/somewhere/else"
    assert model_digest(model) == original
    model.resize_token_embeddings(model.config.vocab_size + 3, mean_resizing=False)
    assert model_digest(model) == original


def test_rotary_frequencies_count(build_model: Build) -> None:
    other = build_model(seed=1, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0})
    assert not same_weights(model_digest(build_model(seed=1)), model_digest(other))


def test_a_model_without_values_has_no_digest(build_model: Build) -> None:
    assert model_digest(build_model(seed=1).to("meta")) == ""


def test_an_adapter_counts_while_it_is_active(build_model: Build) -> None:
    peft = pytest.importorskip("peft")
    model = build_model("llama", seed=1)
    original = model_digest(model)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, settings)
    active = model_digest(model)
    assert not same_weights(active, original)
    with wrapped.disable_adapter():
        assert model_digest(model) == original
    assert model_digest(model) == active
    merged = wrapped.merge_and_unload()
    assert not same_weights(model_digest(merged), original)


def test_the_digests_decide_and_without_them_the_names() -> None:
    one, other = "a" * 64, "b" * 64
    assert mismatch("maker/model", one, "renamed", one) is None
    assert mismatch("maker/model", one, "maker/model", other) == (
        "made by a model 'maker/model' with other weights, expected one of these weights"
    )
    assert mismatch("maker/model", "", "model", other) is None
    assert "so the name decides" in str(mismatch("maker/model", "", "renamed", other))


def test_a_cache_goes_with_the_weights(build_model: Build, tmp_path: Path) -> None:
    model, same, other = build_model(seed=1), build_model(seed=1), build_model(seed=2)
    same.name_or_path = "maker/renamed"
    PrunedCache.prefill(model, torch.arange(3, 93)[None], SnapKV(keep=0.5, window=8)).save(tmp_path / "cache")
    cache = PrunedCache.load(tmp_path / "cache")
    cache.check_model(same)
    with pytest.raises(ValueError, match="cache: it was made by a model 'unnamed' with other weights"):
        cache.check_model(other)


def test_soft_tokens_go_with_the_weights(lively_copies: tuple[Condenser, Condenser, Condenser], tmp_path: Path) -> None:
    condenser, renamed, retrained = lively_copies
    condenser.compress("The harvest was counted in the north archive.", 2).save(tmp_path / "soft")
    soft = SoftTokens.load(tmp_path / "soft")
    assert soft.model_digest == model_digest(condenser.model)
    renamed.prepare(soft, "Where?")
    with pytest.raises(SoftTokensError, match="with other weights, expected one of these weights: compress again"):
        retrained.prepare(soft, "Where?")


def test_a_trained_compressor_goes_with_the_weights(tiny_model_path: Path, tmp_path: Path) -> None:
    condenser = Condenser.from_pretrained(tiny_model_path, device="cpu")
    folder = tiny_model_path / "condense" / "pool"
    assert CompressorConfig.load(folder).model_digest == model_digest(condenser.model)
    model = copy.deepcopy(condenser.model)
    model.name_or_path = "maker/renamed"
    Condenser(model, condenser.tokenizer, compressor=folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.1)
    model.name_or_path = str(tiny_model_path)
    with pytest.raises(ValueError, match="was trained for a model 'random-tiny' with other weights"):
        Condenser(model, condenser.tokenizer, compressor=folder)


@pytest.mark.parametrize("method", ["pool", "mean", "memory"])
def test_the_embedded_checkpoints_name_the_embedded_weights(method: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(embedded_model_path())
    assert CompressorConfig.load(embedded_model_path() / "condense" / method).model_digest == model_digest(model)


@pytest.fixture
def lively_copies(tiny_condenser: Condenser, build_model: Build) -> tuple[Condenser, Condenser, Condenser]:
    """Condensers of one model, of a copy of another name, and of one of the first's name and other weights."""
    tokenizer = tiny_condenser.tokenizer
    models = [build_model(seed=seed, vocab_size=len(tokenizer)) for seed in (1, 1, 2)]
    for model, name in zip(models, ("maker/model", "copy", "maker/model"), strict=True):
        model.name_or_path = name
    first, renamed, retrained = (Condenser(model, tokenizer, method="select") for model in models)
    return first, renamed, retrained
