"""GGUF files of Llamas: the weights, the config and the tokenizer that come out, and the files that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from condense_core.decoder.from_gguf import convert
from condense_testing.public_models import CHAT_TEMPLATE, small_llama, vocabulary, write_gguf


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("gguf")
    weights = write_gguf(folder / "tiny.gguf", small_llama())
    (folder / "out").mkdir()
    assert convert(folder / "tiny.gguf", folder / "out") == sum(weight.numel() for weight in weights.values())
    return folder / "out", weights


@pytest.fixture(scope="module")
def read_back(converted: tuple[Path, dict[str, torch.Tensor]]) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(converted[0])


def test_every_weight_is_the_quantised_one_in_bf16(converted: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, weights = converted
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    assert found.keys() == weights.keys()
    assert [name for name in weights if not torch.equal(found[name], weights[name])] == []
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_head_of_its_own_is_read_too(tmp_path: Path) -> None:
    weights = write_gguf(tmp_path / "untied.gguf", small_llama(tied=False))
    convert(tmp_path / "untied.gguf", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_the_logits_are_those_of_the_model_that_was_written(converted: tuple[Path, dict[str, torch.Tensor]]) -> None:
    """That queries and keys turn as they did shows here: rows in another order would give other logits."""
    folder, weights = converted
    expected = small_llama()
    expected.load_state_dict({name: value.float() for name, value in weights.items()}, strict=False)
    ids = torch.arange(3, 67)[None]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits)


def test_config_and_generation_config_hold_nothing_of_the_file_s_origin(
    converted: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    folder, _ = converted
    config = json.loads((folder / "config.json").read_text())
    assert (config["rms_norm_eps"], config["rope_parameters"]["rope_theta"]) == (1e-5, 50000.0)
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "bfloat16")
    assert (config["max_position_embeddings"], config["head_dim"]) == (512, 16)
    assert not [key for key in config if "name_or_path" in key or "quantization" in key]
    generation = json.loads((folder / "generation_config.json").read_text())
    del generation["transformers_version"]
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("the 42", ["t", "he", "Ġ", "4", "2"]),
        ("a  42", ["a", "ĠĠ", "4", "2"]),  # GPT-2 would cut in front of the second space
        ("a\n\n42", ["a", "ĊĊ", "4", "2"]),
        ("a  the", ["a", "Ġ", "Ġthe"]),
        ("<|im_start|>a", ["<|im_start|>", "a"]),
        ("é", ["Ã", "©"]),
    ],
)
def test_text_becomes_the_tokens_that_the_file_asks_for(
    read_back: PreTrainedTokenizerBase, text: str, tokens: list[str]
) -> None:
    ids = read_back(text)["input_ids"]
    assert read_back.convert_ids_to_tokens(ids) == tokens
    assert read_back.decode(ids) == text


def test_the_tokenizer_has_its_special_tokens_its_template_and_its_length(read_back: PreTrainedTokenizerBase) -> None:
    named = (read_back.bos_token, read_back.eos_token, read_back.unk_token, read_back.pad_token)
    assert named == ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_end|>")
    assert read_back.chat_template == CHAT_TEMPLATE
    assert read_back.model_max_length == 512
    assert len(read_back) == len(vocabulary())
    assert all(token.special for token in read_back.added_tokens_decoder.values())


def test_a_token_of_the_user_is_whole_and_not_special(tmp_path: Path) -> None:
    kinds = [4 if token == "he" else 3 if token.startswith("<|") else 1 for token in vocabulary()]
    write_gguf(tmp_path / "t.gguf", small_llama(), tokenizer__ggml__token_type=kinds)
    convert(tmp_path / "t.gguf", tmp_path)
    added = AutoTokenizer.from_pretrained(tmp_path).added_tokens_decoder.values()
    assert {token.content: token.special for token in added}["he"] is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "qwen2"}, "gguf: the architecture is 'qwen2', expected 'llama'"),
        ({"llama__rope__scaling__type": "yarn"}, "gguf: the rotary embedding is scaled ('yarn')"),
        ({"tokenizer__ggml__pre": "tekken"}, "gguf: the tokenizer is 'gpt2' cut by 'tekken'; known are gpt-2, smollm"),
        ({"tokenizer__ggml__model": "llama"}, "gguf: the tokenizer is 'llama'"),
        ({"tokenizer__ggml__add_bos_token": True}, "gguf: the tokenizer adds tokens around a text"),
        ({"leave_out": ("llama.block_count",)}, "gguf: the file has no llama.block_count"),
        ({"leave_out": ("tokenizer.ggml.eos_token_id",)}, "gguf: the file has no tokenizer.ggml.eos_token_id"),
        ({"extra_tensor": "blk.0.ffn_gate_exps.weight"}, "gguf: the tensor 'blk.0.ffn_gate_exps.weight' is not one"),
        ({"extra_tensor": "blk.0.attn_q.bias"}, "gguf: the tensor 'blk.0.attn_q.bias' is not one of a Llama"),
        ({"extra_tensor": "blk.2.attn_norm.weight"}, "gguf: model.layers.2.input_layernorm.weight has the shape (32,)"),
        ({"llama__embedding_length": 128}, "gguf: model.embed_tokens.weight has the shape"),
    ],
)
def test_what_is_not_known_is_refused_by_name(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    write_gguf(tmp_path / "odd.gguf", small_llama(), **changes)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError) as caught:
        convert(tmp_path / "odd.gguf", tmp_path / "out")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("hello " * 20)
    with pytest.raises(ValueError, match="GGUF"):
        convert(tmp_path / "text.gguf", tmp_path)
