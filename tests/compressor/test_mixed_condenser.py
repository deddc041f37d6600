"""``mixed`` as a user has it: trained for a model, loaded with it, at ratios that are no integers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from condense_core.compressor.compressor import Compressor
from condense_core.compressor.condenser import Condenser
from condense_core.compressor.config import CompressorConfig, num_kept
from condense_core.tasks.prose import ProseWriter


def write_checkpoint(model_path: Path, folder: Path, method: str = "mixed", **changes: object) -> Compressor:
    """A checkpoint with an adapter and weights as after training, and the compressor it was saved from."""
    model = AutoModelForCausalLM.from_pretrained(model_path).requires_grad_(False).eval()
    width = model.get_input_embeddings().weight.shape[1]
    fields: dict[str, object] = {
        "d_model": width,
        "encoder_layers": 1,
        "ratios": (2.5, 4) if method == "mixed" else (2, 8),
        "num_heads": 4,
        "window": 8 if method == "mixed" else 0,
        "mlp_hidden": 32,
        "residual": True,
        "lora_rank": 2,
        "lora_alpha": 2.0,
    }
    torch.manual_seed(0)
    compressor = Compressor(model, CompressorConfig(method, **(fields | changes)))  # type: ignore[arg-type]
    compressor.attach_lora()
    with torch.no_grad():
        for parameter in compressor.trainable_parameters():
            parameter.copy_((parameter + torch.randn(parameter.shape) * 0.1).bfloat16())
    compressor.save(folder)
    return compressor


@pytest.fixture(scope="module")
def folder(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    write_checkpoint(tiny_model_path, folder)
    return folder


@pytest.fixture(scope="module")
def mixed(tiny_model_path: Path, folder: Path) -> Condenser:
    return Condenser.from_pretrained(tiny_model_path, compressor=folder, device="cpu")


@pytest.mark.parametrize("ratio", [1, 2.5, 3.3, 4, 8])
def test_exact_counts_at_any_ratio_up_to_the_window(mixed: Condenser, ratio: float) -> None:
    texts = [
        ProseWriter().document(0, 20),
        "The postman walked past the hills on the way back.",
        ProseWriter().document(1, 3),
    ]
    softs = mixed.compress(texts, ratio=ratio)
    for text, soft in zip(texts, softs, strict=True):
        n = len(mixed.encode(text))
        assert len(soft) == num_kept(n, ratio)
        assert soft.embeds.isfinite().all()
        torch.testing.assert_close(mixed.compress(text, ratio=ratio).embeds, soft.embeds, atol=2e-4, rtol=2e-4)


def test_whole_sentences_stay_exact(mixed: Condenser) -> None:
    """Each run of exact rows begins where a sentence does, but for the last sentence that there was room for."""
    text = ProseWriter().document(2, 30)
    ids = mixed.encode(text)
    table = mixed.model.get_input_embeddings()(torch.tensor(ids))
    soft = mixed.compress(text, ratio=2.5).embeds
    exact, at = [], 0
    for row in soft:
        places = [i for i in range(at, len(ids)) if torch.equal(table[i], row)]
        if places:
            at = places[0] + 1
            exact.append(places[0])
    assert len(exact) >= len(ids) * 0.3  # 31 in a hundred
    starts = [i for i in exact if i - 1 not in exact]
    ends = mixed.tokenizer.batch_decode([[i] for i in ids])
    cut = [i for i in starts if i and not ends[i - 1].rstrip().endswith((".", "!", "?"))]
    assert len(cut) <= 1


def test_what_it_refuses(mixed: Condenser, tiny_model_path: Path) -> None:
    with pytest.raises(ValueError, match="ratio: got 9, expected at most 8, the window of this 'mixed' compressor"):
        mixed.compress("The postman walked past the hills on the way back.", ratio=9)
    with pytest.raises(ValueError, match="question: the method 'mixed' reads none"):
        mixed.compress("The hills.", ratio=2, question="Where?")
    with pytest.raises(ValueError, match="method: 'mixed' is of use only trained"):
        Condenser.from_pretrained(tiny_model_path, method="mixed", device="cpu")


def test_it_begins_with_the_weights_of_a_pool(tiny_model_path: Path, tmp_path: Path) -> None:
    pool = write_checkpoint(tiny_model_path, tmp_path / "pool", "pool")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path).requires_grad_(False).eval()
    config = CompressorConfig.load(tmp_path / "pool")
    fields = {**vars(config), "method": "mixed", "window": 8, "ratios": (4,)}
    made = Compressor(model, CompressorConfig(**fields))
    made.attach_lora()
    made.start_from(tmp_path / "pool")
    ids = torch.arange(5, 69)
    own = dict(made.named_parameters())
    for name, parameter in pool.named_parameters():
        if (name.startswith(("pooler", "projection")) and name in own) or "lora_" in name:
            torch.testing.assert_close(own[name], parameter, atol=0, rtol=0)
    assert made(ids, [0, 64], 4).shape == (16, config.d_model)
    other = Compressor(model, CompressorConfig(**{**fields, "mlp_hidden": 16}))
    with pytest.raises(ValueError, match=r"mlp_hidden: the checkpoint .*pool has 32, expected 16"):
        other.start_from(tmp_path / "pool")
