"""What soft tokens of a model can be checked against without its weights: its tokenizer, width, and maybe digest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from condense_core.decoder.architecture import decoder_parts
from condense_core.decoder.catalog import model_path
from condense_core.decoder.identity import model_digest
from condense_core.decoder.model import load_errors
from condense_core.decoder.partial import UnloadedDecoder
from condense_core.decoder.prompt import encode_context


@dataclass(frozen=True, eq=False)
class ModelDescription:
    """A model that is not loaded.

    Attributes:
        width: of its input embeddings. digest: of its weights (``identity.model_digest``), "" where they are not here.
    """

    tokenizer: PreTrainedTokenizerBase
    width: int
    digest: str = ""

    def count(self, text: str) -> int:
        """How many tokens a context has, as compressors count them; ``ValueError`` where there are none."""
        return len(encode_context(self.tokenizer, text))


def describe_model(name_or_path: str | Path, *, revision: str | None = None) -> ModelDescription:
    """A model's description, of its config and its tokenizer; of weights some bytes are read where a folder has them.

    Nothing but config and tokenizer is fetched for a hub id. ``ValueError`` where these cannot be had.
    """
    name = model_path(name_or_path)
    with load_errors(name):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, revision=revision)
        config = AutoConfig.from_pretrained(name, revision=revision)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        width = int(decoder_parts(model).embed_tokens.weight.shape[1])
    return ModelDescription(tokenizer, width, _digest(name, revision))


def _digest(name: str, revision: str | None) -> str:
    if not Path(name).is_dir():
        return ""
    try:
        return model_digest(UnloadedDecoder(name, device="cpu", revision=revision).model)
    except ValueError:  # no weights, or such that only a whole model has a digest
        return ""
