"""A model's description says without weights what the loaded model says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from condense_core.compressor.condenser import Condenser
from condense_core.decoder.architecture import decoder_parts
from condense_core.decoder.description import describe_model

TEXTS = ("The keeper of the north archive.", "Ünïcödé 🦉 \x00", "</s><s> spelled out <|im_end|>", " ")


@pytest.mark.parametrize("weights", [True, False], ids=["with its weights", "of config and tokenizer alone"])
def test_a_description_is_that_of_the_loaded_model(tiny_model_path: Path, tmp_path: Path, weights: bool) -> None:
    condenser = Condenser.from_pretrained(tiny_model_path, method="select")
    folder = tmp_path / "copy"
    shutil.copytree(tiny_model_path, folder, ignore=None if weights else shutil.ignore_patterns("*.safetensors"))
    described = describe_model(folder)
    assert described.width == decoder_parts(condenser.model).embed_tokens.weight.shape[1]
    assert described.digest == (condenser.model_digest if weights else "")
    assert [described.count(text) for text in TEXTS] == [len(condenser.encode(text)) for text in TEXTS]


def test_the_embedded_model_has_its_name() -> None:
    described = describe_model("condense-tiny")
    assert (described.width, len(described.digest)) == (384, 64)


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "owner/no-such-model"])
def test_what_cannot_be_described_is_one_line(name: str) -> None:
    with pytest.raises(ValueError, match=r"^model: [^\n]*$"):
        describe_model(name)


def test_a_text_of_no_tokens_is_refused(tiny_model_path: Path) -> None:
    with pytest.raises(ValueError, match="text: empty"):
        describe_model(tiny_model_path).count("")
