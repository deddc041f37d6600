"""The trainable part of a compressor: packed token ids in, soft tokens out. Weights, but no text and no tokenizer."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from condense_core.compressor import lora
from condense_core.compressor.config import WEIGHTS_NAME, CompressorConfig, exact_ratio, num_kept
from condense_core.compressor.encoder import Encoder
from condense_core.compressor.pooler import MemoryTokens, Projection, WindowPooler
from condense_core.compressor.selection import Passage, Selector, keep_sentences
from condense_core.decoder.architecture import decoder_parts
from condense_core.decoder.identity import model_digest
from condense_core.files.tensors import save_tensors

_RUN = 16  # tokens that `select` keeps or drops together where it is not told where sentences are


class Compressor(nn.Module):
    """``method`` of ``config`` over the first layers of ``model``, whose parameters it shares."""

    def __init__(self, model: PreTrainedModel, config: CompressorConfig) -> None:
        super().__init__()
        embed = decoder_parts(model).embed_tokens
        if embed.weight.shape[1] != config.d_model:
            raise ValueError(f"d_model: the compressor has {config.d_model}, the model {embed.weight.shape[1]}")
        # What a checkpoint of it is for, unless one says so already.
        self.config = config if config.model_digest else replace(config, model_digest=model_digest(model))
        self.embed_tokens = embed
        self.max_positions = int(model.config.max_position_embeddings)
        self.encoder = Encoder(model, config.encoder_layers, causal=config.causal)
        self._model = (model,)  # in a tuple, where torch does not see it: its parameters are not the compressor's
        self._selector: Selector | None = None
        # A meta model (shape checks of a 7B without its memory) has no norm to measure; any will do.
        norm = 1.0 if embed.weight.is_meta else embedding_norm(embed)
        trained = config.method != "select"
        self.pooler = WindowPooler(config) if config.method in ("pool", "mean") else None
        self.memory = MemoryTokens(config, norm) if config.method == "memory" else None
        self.projection = Projection(config.d_model, config.mlp_hidden, norm) if trained else None

    def own_modules(self) -> dict[str, nn.Module]:
        """The modules whose weights belong to the compressor, not to the decoder (adapters aside)."""
        modules = {"pooler": self.pooler, "memory": self.memory, "projection": self.projection}
        return {name: module for name, module in modules.items() if module is not None}

    def attach_lora(self) -> None:
        """Make the encoder's linears trainable through an adapter, as ``config`` says."""
        if self.config.lora_rank:
            lora.attach(self.encoder.layers, self.config.lora_rank, self.config.lora_alpha)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Own weights and attached adapters; the decoder's parameters are not among them."""
        own = [p for module in self.own_modules().values() for p in module.parameters() if p.requires_grad]
        adapters = [m for m in self.encoder.modules() if isinstance(m, lora.LoRALinear)]
        return own + [p for m in adapters for p in (m.lora_A, m.lora_B)]

    def offsets(self, lengths: list[int], ratio: float) -> list[int]:
        """Offsets ``[0, ..., T]`` of the segments that packed texts of ``lengths`` tokens are read in.

        A text beyond the encoder's positions becomes several segments, all but its last a multiple of ``ratio`` long,
        so that n tokens give ceil(n / ratio) soft tokens however they are cut. ``ValueError`` where a ratio has so many
        decimals that no integer up to the encoder's positions is a multiple of it.
        """
        limit = self.config.segment_tokens or self.max_positions
        if self.memory is not None:
            limit = int(self.max_positions * ratio // (ratio + 1))  # its slots take positions too
            limit = min(limit, self.config.segment_tokens or limit)
        unit = exact_ratio(ratio).numerator  # the smallest integer that is a multiple of it
        if unit > limit and unit != ratio and max(lengths, default=0) > limit:
            raise ValueError(f"ratio: got {ratio} for a text of {max(lengths):,} tokens, expected fewer decimals")
        segment = max(unit, limit // unit * unit)
        ends = [0]
        for length in lengths:
            start = ends[-1]
            ends += [start + min(at + segment, length) for at in range(0, length, segment)]
        return ends

    def forward(self, input_ids: Tensor, cu_seqlens: list[int], ratio: float) -> Tensor:
        """Soft tokens ``[K, d_model]`` of the packed ``input_ids [T]``; sequence s gives ceil(n_s / ratio) of them.

        ``cu_seqlens``: what ``offsets`` gives.
        """
        embeds = self.embed_tokens(input_ids)
        if self.config.method == "select":
            ids = input_ids.tolist()
            passages = [Passage(ids[a:b], [i // _RUN for i in range(b - a)]) for a, b in pairwise(cu_seqlens)]
            kept = self.select(passages, ratio)
            starts = cu_seqlens[:-1]
            return embeds[torch.cat([start + i for start, i in zip(starts, kept, strict=True)]).to(embeds.device)]
        assert self.projection is not None
        assert isinstance(ratio, int), f"ratio {ratio} for {self.config.method}"
        if self.memory is not None:
            mixed, ends, rows = self.memory.append(embeds, cu_seqlens, ratio)
            pooled = self.memory.read(self.encoder(mixed, ends)[0], rows)
        else:
            assert self.pooler is not None
            hidden, _ = self.encoder(embeds, cu_seqlens)
            # On the host, where ops checks them; None for one sequence, so that shapes alone decide (meta tensors).
            offsets = torch.tensor(cu_seqlens) if len(cu_seqlens) > 2 else None
            pooled = self.pooler(hidden, offsets, ratio)
        return self.projection(pooled).to(embeds.dtype)

    @property
    def selector(self) -> Selector:
        """What scores tokens for ``select``; ``ValueError`` for an encoder without layers."""
        if self._selector is None:
            self._selector = Selector(self._model[0], self.encoder, self.config.segment_tokens or self.max_positions)
        return self._selector

    def select(self, passages: list[Passage], ratio: float) -> list[Tensor]:
        """For each passage of n tokens the ascending indices of the ceil(n / ratio) that ``select`` keeps, on the CPU.

        ``ValueError`` for an encoder without layers, or a question too long to be read with a text.
        """
        return [
            keep_sentences(scores, torch.tensor(passage.sentences, dtype=torch.long), num_kept(len(scores), ratio))
            for passage, scores in zip(passages, self.selector.scores(passages), strict=True)
        ]

    def save(self, folder: Path) -> None:
        """Write config, own weights (bf16, scalars fp32) and, where attached, the adapter in peft's format."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{prefix}.{name}": t.detach().to(torch.bfloat16 if t.dim() else torch.float32).contiguous()
            for prefix, module in self.own_modules().items()
            for name, t in module.state_dict().items()
        }
        save_tensors(tensors, folder / WEIGHTS_NAME)
        self.config.save(folder)
        if self.config.lora_rank:
            rank, alpha = self.config.lora_rank, self.config.lora_alpha
            lora.save(self.encoder.layers, folder, rank=rank, alpha=alpha, base_model=self.config.model_id)

    def load_weights(self, folder: Path) -> None:
        """Read what ``save`` wrote and merge the adapter; ``ValueError`` where it does not fit."""
        path = folder / WEIGHTS_NAME
        try:
            tensors = load_file(path)
            for prefix, module in self.own_modules().items():
                own = {k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")}
                module.load_state_dict(own)
        except FileNotFoundError:
            raise ValueError(f"{folder}: no {WEIGHTS_NAME} here; expected a compressor checkpoint folder") from None
        except Exception as error:
            raise ValueError(
                f"{path}: weights do not fit {self.config.method!r} as its config says ({' '.join(str(error).split())})"
            ) from error
        if self.config.lora_rank:
            lora.merge(self.encoder.layers, folder)


@torch.no_grad()
def embedding_norm(embed: nn.Module) -> float:
    """Mean norm of a token's embedding, as the model sees it: a scale that the module applies is counted."""
    weight: Tensor = embed.weight.detach()  # type: ignore[operator]
    some = torch.arange(min(len(weight), 256), device=weight.device)
    scale = embed(some).float().norm() / weight[some].float().norm().clamp_min(1e-30)
    return float(weight.float().norm(dim=-1).mean() * scale)
