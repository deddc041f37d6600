"""The recipe for the embedded model: ``python -m condense_core.training.tiny --corpus train.jsonl.xz``.

Tokenizer, LM from a structured start, the LM together with its compressors, then each compressor for the frozen LM
with the same budget. Every part resumes where it was cut off; the parts' folders in ``--work`` are the state. On two
CPU cores it takes some two hours, on a GPU minutes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM, PreTrainedTokenizerBase

from condense_core.compressor.compressor import Compressor
from condense_core.compressor.config import MEMORY_SEGMENT, CompressorConfig
from condense_core.tasks.facts import vocabulary_text
from condense_core.tasks.sources import TextSource, open_source
from condense_core.training.checkpoint import load_state
from condense_core.training.curves import plot_curves, read_log
from condense_core.training.data import BatchMaker
from condense_core.training.induction_init import induction_init
from condense_core.training.pretrain import Stage, pretrain
from condense_core.training.store import SentenceStore
from condense_core.training.tokenizer import train_tokenizer
from condense_core.training.trainer import TrainConfig, train_compressor

MODEL_ID = "condense-tiny"
VOCAB_SIZE = 4096
POSITIONS = 4096
RATIOS = (2, 4, 8, 16, 32)
METHODS = ("pool", "mean", "memory")
SEED = 0

LM_STAGES = [Stage(steps=400, min_context=96, max_context=256, tokens=5000, lr=1.5e-3)]
COTRAIN_STAGES = [
    Stage(600, 64, 256, tokens=5000, lr=1.2e-3, plain=0.25, reconstruction=0.15),
    Stage(900, 128, 1024, tokens=6000, lr=1.2e-3, plain=0.25, reconstruction=0.15),
    Stage(900, 256, 2100, tokens=8000, lr=1e-3, plain=0.3, text=0.4, reconstruction=0.1),
]
COMPRESSOR_TRAINING = TrainConfig(
    steps=240,
    tokens=8000,
    min_context=256,
    max_context=2100,
    lr=1e-3,
    warmup=20,
    reconstruction=0.1,
    continuation=0.05,
    ratio_weights=(0.1, 0.35, 0.3, 0.15, 0.1),
    save_every=60,
)


def lm_config() -> MistralConfig:
    """The shape of the embedded LM: 6.7 M parameters."""
    return MistralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=384,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=POSITIONS,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


def compressor_config(method: str) -> CompressorConfig:
    """The shape of its compressor of one method; all share it, so that they can be compared."""
    return CompressorConfig(
        method=method,
        d_model=384,
        encoder_layers=2,
        ratios=RATIOS,
        num_heads=12 if method == "pool" else 1,
        mlp_hidden=768,
        lora_rank=32,
        lora_alpha=32.0,
        segment_tokens=MEMORY_SEGMENT if method == "memory" else 0,
        model_id=MODEL_ID,
    )


def build_compressor(model: MistralForCausalLM, method: str) -> Compressor:
    """A compressor before its training, with an adapter attached and, for ``pool``, heads that tell places apart."""
    compressor = Compressor(model, compressor_config(method))
    compressor.attach_lora()
    if method == "pool" and compressor.pooler is not None:
        compressor.pooler.start_ordered()
    return compressor


def build_tokenizer(source: TextSource, folder: Path) -> PreTrainedTokenizerBase:
    """Train on every second document and on train-split facts, or load what an earlier run wrote."""
    if not (folder / "tokenizer.json").exists():
        documents = (source.document(i) for i in range(0, len(source), 2))
        texts = chain(documents, vocabulary_text(SEED, 60_000))
        train_tokenizer(texts, vocab_size=VOCAB_SIZE, max_length=POSITIONS).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def run(corpus: Path, work: Path, out: Path) -> None:
    """All parts in order; a finished part costs only its loading."""
    console = Console()
    source = open_source(corpus)
    tokenizer = build_tokenizer(source, work / "tokenizer")
    console.print(f"corpus {corpus.name}: {len(source)} documents; reading them as tokens ...")
    store = SentenceStore((source.document(i) for i in range(len(source))), tokenizer)
    console.print(f"{len(store.ids):,} tokens in {len(store):,} sentences")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(SEED)
    model = MistralForCausalLM(lm_config())
    induction_init(model, seed=SEED)
    model.to(device)

    with _progress(console, "language model", LM_STAGES) as step:
        pretrain(model, {}, BatchMaker(store, tokenizer, seed=1), LM_STAGES, work / "lm", progress=step)
    compressors = {method: build_compressor(model, method).to(device) for method in METHODS}
    with _progress(console, "with compressors", COTRAIN_STAGES) as step:
        maker = BatchMaker(store, tokenizer, seed=2)
        if not (work / "cotrain" / "state.safetensors").exists():
            load_state(work / "lm", {"lm": model}, None)
        pretrain(model, compressors, maker, COTRAIN_STAGES, work / "cotrain", progress=step)

    save_model(model, tokenizer, out)
    # What ships is bf16: the compressors are trained for the decoder as it will be loaded. Not `model.to`, which would
    # round the rotary frequencies too; those are computed anew in fp32 whenever a model is loaded.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    model.eval()
    for method, compressor in compressors.items():
        with _progress(console, f"compressor {method}", [COMPRESSOR_TRAINING]) as step:
            maker = BatchMaker(store, tokenizer, seed=3)
            train_compressor(model, compressor, maker, COMPRESSOR_TRAINING, work / method, progress=step)
        compressor.save(out / "condense" / method)
    save_curves(work, out)
    console.print(f"wrote {out}; next: condense eval --model {out} --corpus VALID.jsonl.xz")


def save_model(model: MistralForCausalLM, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write the LM in bf16 with its tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    state = {name: t.detach().to(torch.bfloat16) for name, t in model.state_dict().items()}
    shipped = MistralForCausalLM(lm_config()).to(torch.bfloat16)
    shipped.load_state_dict(state)
    shipped.save_pretrained(out)
    tokenizer.save_pretrained(out)


def save_curves(work: Path, out: Path) -> None:
    """Collect the logs of all parts into ``curves.json`` and ``curves.png``."""
    curves: dict[str, list[dict[str, Any]]] = {
        part: read_log(work / part / "log.jsonl") for part in ("lm", "cotrain", *METHODS)
    }
    (out / "curves.json").write_text(json.dumps(curves, separators=(",", ":")) + "\n")
    plot_curves(curves, out / "curves.png")


@contextmanager
def _progress(console: Console, title: str, stages: list[Any]) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[line]}"), console=console) as bar:
        task = bar.add_task(title, total=sum(stage.steps for stage in stages), line="")
        yield lambda done, line: bar.update(task, completed=done, line=line)


def main(
    corpus: Annotated[
        Path, typer.Option(help="Training text: a folder, or a .jsonl(.xz) file with a 'text' per line.")
    ],
    work: Annotated[Path, typer.Option(help="Folder of the run's resumable state.")] = Path("runs/tiny"),
    out: Annotated[Path, typer.Option(help="Folder of the model to write.")] = Path("models/condense-tiny"),
    restart: Annotated[bool, typer.Option(help="Forget an earlier run's state.")] = False,
) -> None:
    """Train the embedded model and its compressors."""
    if restart:
        shutil.rmtree(work, ignore_errors=True)
    run(corpus, work, out)


if __name__ == "__main__":
    typer.run(main)
