"""A GGUF file of the Llama architecture as a folder that transformers loads: bf16 safetensors, config, tokenizer.

transformers reads GGUF as well, but refuses to save what it read, needs accelerate for it, may ask a hub for kernels,
and does not know every pre-tokenizer: SmolLM2's, which cuts numbers into digits before anything else, becomes GPT-2's,
so that white space in front of a number gives other tokens than those that the model was trained on.

The format: the GGUF specification (ggml). The package ``gguf`` reads it and unpacks quantised blocks; what stands here
are names, the order of rows in the projections of queries and keys, and the tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from condense_core.files.tensors import save_tensors

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL, _USER_DEFINED = 3, 4  # kinds of tokens in `tokenizer.ggml.token_type`

#: How text is cut before byte pairs are merged, by `tokenizer.ggml.pre`.
_PRE_TOKENIZERS: dict[str, Callable[[], Any]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}


def convert(source: Path, folder: Path, progress: Callable[[int, int], None] | None = None) -> int:
    """Write what ``source`` holds into ``folder`` and return the number of parameters.

    Args:
        source: the GGUF file.
        folder: an existing one; ``config.json``, ``generation_config.json``, ``model.safetensors`` and the tokenizer's
            files are written.
        progress: called with the number of tensors that are done and of all.

    Raises:
        ValueError: it is no GGUF file, or of an architecture or a tokenizer that is not known here.
        OSError: the folder cannot be written.
        ImportError: the package ``gguf`` is missing.
    """
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(str(source))
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(metadata, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    tokenizer = _tokenizer(metadata, config.max_position_embeddings)
    tensors: dict[str, Tensor] = {}
    for done, tensor in enumerate(reader.tensors):
        if progress is not None:
            progress(done, len(reader.tensors))
        # A copy where it is a view of the file: torch wants memory that could be written.
        values = np.require(dequantize(tensor.data, tensor.tensor_type), np.float32, ["C", "W"])
        name = _name(tensor.name)
        if name.endswith("q_proj.weight"):
            values = _neighbours_to_halves(values, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            values = _neighbours_to_halves(values, config.num_key_value_heads)
        tensors[name] = torch.from_numpy(values).to(torch.bfloat16).contiguous()
    _check(config, tensors)
    save_tensors(tensors, folder / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
    special = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**special).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(tensor.numel() for tensor in tensors.values())


def _config(metadata: dict[str, Any], *, tied: bool) -> LlamaConfig:
    """The model's shape."""
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"gguf: the architecture is {architecture!r}, expected 'llama'")
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(f"gguf: the rotary embedding is scaled ({scaling!r}), expected 'none'")
    heads = int(_need(metadata, "llama.attention.head_count"))
    width = int(_need(metadata, "llama.embedding_length"))
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype=torch.bfloat16,
        vocab_size=len(_need(metadata, "tokenizer.ggml.tokens")),
        hidden_size=width,
        intermediate_size=int(_need(metadata, "llama.feed_forward_length")),
        num_hidden_layers=int(_need(metadata, "llama.block_count")),
        num_attention_heads=heads,
        num_key_value_heads=int(metadata.get("llama.attention.head_count_kv", heads)),
        head_dim=int(metadata.get("llama.rope.dimension_count", width // heads)),
        max_position_embeddings=int(_need(metadata, "llama.context_length")),
        rms_norm_eps=_shortest(_need(metadata, "llama.attention.layer_norm_rms_epsilon")),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": _shortest(metadata.get("llama.rope.freq_base", 10000.0)),
        },
        tie_word_embeddings=tied,
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=_need(metadata, "tokenizer.ggml.eos_token_id"),
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id", metadata["tokenizer.ggml.eos_token_id"]),
    )


def _tokenizer(metadata: dict[str, Any], positions: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with its special tokens and its chat template."""
    kind = (_need(metadata, "tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre"))
    if kind[0] != "gpt2" or kind[1] not in _PRE_TOKENIZERS:
        raise ValueError(
            f"gguf: the tokenizer is {kind[0]!r} cut by {kind[1]!r}; known are {', '.join(_PRE_TOKENIZERS)}"
        )
    if metadata.get("tokenizer.ggml.add_bos_token") or metadata.get("tokenizer.ggml.add_eos_token"):
        raise ValueError("gguf: the tokenizer adds tokens around a text, expected one that adds none")
    spelled: list[str] = _need(metadata, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _need(metadata, "tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(spelled)}, merges=merges))
    backend.pre_tokenizer = _PRE_TOKENIZERS[kind[1]]()
    backend.decoder = decoders.ByteLevel()
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    for wanted, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [t for t, found in zip(spelled, kinds, strict=bool(kinds)) if found == wanted]
        backend.add_tokens([AddedToken(token, normalized=False, special=special) for token in added])
    named = {
        f"{name}_token": spelled[metadata[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
        **named,
    )


def _name(name: str) -> str:
    """A tensor's name in transformers."""
    stem, _, kind = name.rpartition(".")
    if kind == "weight" and stem in _OUTER:
        return f"{_OUTER[stem]}.weight"
    _, layer, part = [*stem.split("."), "", ""][:3]
    if kind == "weight" and stem == f"blk.{layer}.{part}" and part in _INNER:
        return f"model.layers.{layer}.{_INNER[part]}.weight"
    raise ValueError(f"gguf: the tensor {name!r} is not one of a Llama")


def _neighbours_to_halves(weights: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Rows of a projection, ``[num_heads * head_dim, d]``, as transformers turns them.

    RoPE turns pairs of a head's dimensions. In a GGUF file the two are neighbours, in transformers they stand half of a
    head apart.
    """
    pairs = weights.reshape(num_heads, -1, 2, weights.shape[1])  # [H, head_dim / 2, 2, d]
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weights.shape)


def _check(config: LlamaConfig, tensors: dict[str, Tensor]) -> None:
    """``ValueError`` unless ``tensors`` are exactly the weights of a model of this ``config``."""
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in LlamaForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ValueError(f"gguf: {name} has the shape {found.get(name)}, expected {wanted.get(name)}")


def _need(metadata: dict[str, Any], key: str) -> Any:
    if key not in metadata:
        raise ValueError(f"gguf: the file has no {key}")
    return metadata[key]


def _shortest(value: float) -> float:
    """A float32 by its shortest decimal: 1e-5, which the file holds as 9.99999974e-06."""
    return float(str(np.float32(value)))
