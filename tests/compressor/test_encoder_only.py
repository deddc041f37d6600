"""A condenser over the first layers alone compresses as one over the whole model, and says what it cannot do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from condense_core.compressor.condenser import Condenser
from condense_core.decoder.identity import model_digest
from condense_core.decoder.partial import open_first_layers
from condense_core.tasks.sources import ProseWriter

TEXTS = [ProseWriter().document(i, n) for i, n in ((1, 9), (2, 2), (3, 5))]
QUESTION = "Who counted the harvest?"


@pytest.mark.parametrize("method", ["pool", "mean", "memory"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trained_compressors_give_the_same_bits(method: str, dtype: torch.dtype) -> None:
    """Of the embedded model, whose compressors have an adapter."""
    whole = Condenser.from_pretrained("condense-tiny", method=method, device="cpu", dtype=dtype)
    part = Condenser.from_pretrained("condense-tiny", method=method, device="cpu", dtype=dtype, encoder_only=True)
    assert whole.config == part.config
    assert whole.config.lora_rank
    for own, expected in zip(part.compress(TEXTS, 8), whole.compress(TEXTS, 8), strict=True):
        assert torch.equal(own.embeds, expected.embeds)
        assert own.model_digest == expected.model_digest
        assert own.model_id == expected.model_id
    assert model_digest(part.model) == whole.model_digest
    whole.prepare(part.compress(TEXTS[1], 8), QUESTION)


def test_select_with_a_question_is_the_same_and_without_one_refused(lively_path: Path) -> None:
    whole = Condenser.from_pretrained(lively_path, method="select", device="cpu")
    part = Condenser.from_pretrained(lively_path, method="select", device="cpu", encoder_only=True)
    text = TEXTS[1][:300]
    assert part.config.encoder_layers == whole.config.encoder_layers == 2  # three fifths of the whole model's
    assert part.compress(text, 4, question=QUESTION).text == whole.compress(text, 4, question=QUESTION).text
    refusal = r"^select without a question: .* without its output head and 1 of its 3 layers; load it whole$"
    with pytest.raises(ValueError, match=refusal):
        part.compress(text, 4)


@pytest.mark.parametrize("method", ["pool", "mean", "memory"])
def test_a_plain_condenser_takes_the_first_layers(lively_path: Path, method: str) -> None:
    model, tokenizer = open_first_layers(lively_path, 2, device="cpu")
    part = Condenser(model, tokenizer, method=method, encoder_layers=2)
    whole = Condenser.from_pretrained(lively_path, method=method, encoder_layers=2, device="cpu")
    whole.compressor.load_state_dict(part.compressor.state_dict())
    assert torch.equal(part.compress(TEXTS[1], 4).embeds, whole.compress(TEXTS[1], 4).embeds)
    assert part.kv_bytes(5) == whole.kv_bytes(5)


def test_mixed_takes_the_first_layers(lively_path: Path, tmp_path: Path) -> None:
    from condense_core.compressor.compressor import Compressor
    from condense_core.compressor.config import CompressorConfig

    whole = Condenser.from_pretrained(lively_path, device="cpu")
    config = CompressorConfig(
        method="mixed", d_model=48, encoder_layers=2, num_heads=4, window=8, mlp_hidden=16, residual=True, ratios=(4,)
    )
    Compressor(whole.model, config).save(tmp_path)
    whole = Condenser(whole.model, whole.tokenizer, compressor=tmp_path)
    part = Condenser.from_pretrained(lively_path, compressor=tmp_path, device="cpu", encoder_only=True)
    assert torch.equal(part.compress(TEXTS[1], 2.5).embeds, whole.compress(TEXTS[1], 2.5).embeds)


def test_the_depth_is_that_of_the_compressor(lively_path: Path) -> None:
    for layers in (0, 1, 3):
        part = Condenser.from_pretrained(
            lively_path, method="pool", encoder_layers=layers, device="cpu", encoder_only=True
        )
        assert len(part.model.model.layers) == len(part.compressor.encoder.layers) == layers
    with pytest.raises(ValueError, match=r"^encoder_layers: got 4, expected 0 to 3, the layers of "):
        Condenser.from_pretrained(lively_path, method="pool", encoder_layers=4, device="cpu", encoder_only=True)


def test_generating_is_refused_in_one_line(tiny_model_path: Path) -> None:
    part = Condenser.from_pretrained(tiny_model_path, device="cpu", encoder_only=True)
    soft = part.compress(TEXTS[0], 4)
    for what, use in (("generate", part.generate), ("stream", lambda *args: list(part.stream(*args)))):
        with pytest.raises(ValueError, match=f"^{what}: the model .* was loaded without its output head") as refused:
            use(soft, QUESTION)
        assert "\n" not in str(refused.value)
    assert part.prepare(soft, QUESTION)["inputs_embeds"].shape[-1] == 96  # embeddings are there


def test_weights_that_an_adapter_was_merged_into_are_let_go(tmp_path: Path) -> None:
    part = Condenser.from_pretrained("condense-tiny", device="cpu", encoder_only=True)
    held = {id(p): p.nbytes for p in (*part.model.parameters(), *part.compressor.parameters())}
    whole = Condenser.from_pretrained("condense-tiny", device="cpu")
    own = sum(p.nbytes for module in whole.compressor.own_modules().values() for p in module.parameters())
    layers = sum(p.nbytes for layer in whole.model.model.layers[:2] for p in layer.parameters())
    outer = sum(p.nbytes for p in (whole.model.model.embed_tokens.weight, whole.model.model.norm.weight))
    assert sum(held.values()) == own + layers + outer


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of resident memory from /proc")
def test_the_peak_of_memory_is_that_of_the_first_layers(
    build_model: Callable[..., PreTrainedModel], tiny_model_path: Path, tmp_path: Path
) -> None:
    """A model of 109 MB in 32 bits, of which embeddings and the first of 12 layers are 9%, is loaded in 16 bits."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    sizes = {"hidden_size": 512, "intermediate_size": 768, "num_hidden_layers": 12, "num_attention_heads": 8}
    model = build_model(**sizes, num_key_value_heads=8, head_dim=64, vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    code = f"""
import re
import torch
from condense_core.compressor.condenser import Condenser
def kilobytes(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])
def load(**options):
    options |= {{"method": "mean", "encoder_layers": 1, "device": "cpu", "dtype": torch.bfloat16}}
    Condenser.from_pretrained({str(tmp_path)!r}, **options)
load(encoder_only=True)  # what is imported late
before = kilobytes("VmRSS")
load(encoder_only=True)
part = kilobytes("VmHWM") - before
load()
print(part, kilobytes("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    part, whole = map(int, done.stdout.split())
    weights = sum(p.numel() for p in model.parameters()) * 2 / 1024
    assert whole > weights
    assert part < 0.4 * weights
