"""Measurements of the encoder on random weights: consistent, of the layers asked for alone, refused where too large."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, Gemma2Config, MistralConfig

from condense_core.compressor.compressor import Compressor
from condense_core.compressor.encoder import Encoder
from condense_core.decoder.architecture import cut_decoder
from condense_core.decoder.partial import MissingHead
from condense_core.profiling import encode, machine
from condense_core.profiling.configs import model_config
from condense_core.profiling.encode import EncodeBenchmark, EncodeSettings, padded_forward
from condense_core.profiling.random_model import random_first_layers
from condense_core.profiling.stages import STAGES

CPU = torch.device("cpu")
SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6}
CONFIG = MistralConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=None)


def benchmark(config: Any = CONFIG, **settings: Any) -> EncodeBenchmark:
    return EncodeBenchmark(config, EncodeSettings(**settings), name="small", device=CPU, dtype=torch.float32)


@pytest.fixture(autouse=True)
def quick_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's peaks are not measured."""
    monkeypatch.setattr(encode, "matmul_peak", lambda device, dtype: 1e11)
    monkeypatch.setattr(encode, "copy_bandwidth", lambda device: 1e10)


@pytest.mark.parametrize("method", ["pool", "mean", "memory"])
def test_numbers_of_a_row_agree(method: str) -> None:
    rows = list(benchmark(layers=(2, 4), batches=(1, 3), chars=1000, rounds=3, method=method, baseline=True).rows())
    assert [(row["layers"], row["batch"], row["tokens"]) for row in rows] == [
        *((2, 1, 250), (2, 3, 750)),
        *((4, 1, 250), (4, 3, 750)),
    ]
    for row in rows:
        seconds = {stage: times["median"] for stage, times in row["seconds"].items()}
        assert all(times["min"] <= times["median"] <= times["max"] for times in row["seconds"].values())
        assert 0.5 * seconds["total"] < sum(seconds[stage] for stage in STAGES) < 1.5 * seconds["total"]
        assert seconds["encode"] > 0
        assert (seconds["pool"] > 0) == (method != "memory")
        assert row["contexts_per_second"] == pytest.approx(row["batch"] / seconds["total"])
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / seconds["total"])
        assert row["soft_tokens"] == row["batch"] * 63
        assert row["floor_seconds"] == pytest.approx(max(row["flops"] / 1e11, row["weight_bytes"] / 1e10))
        assert row["share_of_floor"] == pytest.approx(row["floor_seconds"] / seconds["total"])
        assert row["baseline"]["padded_tokens"] == row["tokens"]
        assert row["baseline"]["padded_over_total"] == pytest.approx(
            row["baseline"]["seconds"]["median"] / seconds["total"]
        )
    assert rows[1]["flops"] == 3 * rows[0]["flops"]
    assert rows[2]["flops"] > 1.7 * rows[0]["flops"]


def test_mixed_lengths_are_the_same_in_every_run() -> None:
    settings = EncodeSettings(layers=(1,), mixed=True)
    lengths = settings.lengths(16)
    assert lengths == EncodeSettings(layers=(2,), mixed=True, chars=9).lengths(16)
    assert len(lengths) == 16
    assert 125 <= min(lengths) < 500 < 1500 < max(lengths) <= 1750
    assert settings.rows() == [(1, 16)]
    short = EncodeSettings(layers=(1,), mixed=True, chars_per_token=16).lengths(16)
    [row] = benchmark(layers=(1,), mixed=True, baseline=True, rounds=1, chars_per_token=16).rows()
    assert row["tokens"] == sum(short)
    assert row["baseline"]["padded_tokens"] == 16 * max(short)


def test_the_baseline_computes_what_the_encoder_does() -> None:
    model = random_first_layers(CONFIG, 3, device=CPU, dtype=torch.float32)
    contexts = [list(range(5, 25)), list(range(7, 14)), list(range(40, 73))]
    with torch.no_grad():
        padded = padded_forward(cut_decoder(model, 3, "sdpa")[0], contexts, CPU)()
        embeds = model.model.embed_tokens(torch.tensor([i for context in contexts for i in context]))
        packed, _ = Encoder(model, 3)(embeds, [0, 20, 27, 60])
    found = torch.cat([rows[: len(context)] for rows, context in zip(padded, contexts, strict=True)])
    torch.testing.assert_close(found, packed, atol=1e-5, rtol=1e-4)


def test_only_the_layers_asked_for_are_created() -> None:
    config = Gemma2Config(**SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    model = random_first_layers(config, 2, device=CPU, dtype=torch.bfloat16)
    assert len(model.model.layers) == 2
    assert isinstance(model.lm_head, MissingHead)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    weight = model.model.layers[1].mlp.up_proj.weight.float()
    assert 0.015 < weight.std() < 0.025
    assert torch.linalg.matrix_rank(weight) == 64
    assert config.num_hidden_layers == 6  # the caller's stays as it is


def test_no_weights_are_needed_for_mistral(monkeypatch: pytest.MonkeyPatch) -> None:
    config = model_config("mistral-7b")
    monkeypatch.setattr(encode, "free_memory", lambda device: 8 * 10**9)
    runner = EncodeBenchmark(config, EncodeSettings(layers=(32,)), name="m", device=CPU, dtype=torch.bfloat16)
    [row] = runner.rows()
    assert row["refused"].startswith("32 layers x 1 contexts: needs about 14.")


def test_rows_that_do_not_fit_are_refused_and_others_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "free_memory", lambda device: 6_000_000)
    rows = list(benchmark(layers=(2,), batches=(1, 64, 2), chars=800, rounds=1).rows())
    assert ["refused" in row for row in rows] == [False, True, False]
    assert rows[1]["refused"].endswith(" GB are free")


@pytest.mark.parametrize(
    "error", [RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), torch.OutOfMemoryError("CUDA")]
)
def test_running_out_of_memory_refuses_the_row(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    original = Compressor.compress_pack

    def compress_pack(self: Compressor, contexts: list[list[int]], *args: Any) -> Any:
        if len(contexts) == 2:
            raise error
        return original(self, contexts, *args)

    monkeypatch.setattr(Compressor, "compress_pack", compress_pack)
    rows = list(benchmark(layers=(1,), batches=(2, 1), chars=200, rounds=1).rows())
    assert rows[0]["refused"] == "1 layers x 2 contexts: out of memory"
    assert "seconds" in rows[1]


def test_other_errors_are_not_taken_for_missing_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Compressor, "compress_pack", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        list(benchmark(layers=(1,), rounds=1).rows())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": ()}, "layers: got \\[\\], expected integers of at least 1"),
        ({"layers": (1,), "batches": (0,)}, "batches: got \\[0\\], expected integers"),
        ({"layers": (1,), "chars": 0}, "chars: got 0, expected an integer of at least 1"),
        ({"layers": (1,), "rounds": 0}, "rounds: got 0, expected an integer of at least 1"),
        ({"layers": (1,), "chars_per_token": float("nan")}, "chars_per_token: got nan, expected a number"),
        ({"layers": (1,), "method": "select"}, "method: got 'select', expected one of pool, mean, memory"),
        ({"layers": (1,), "ratio": 0}, "ratio: got 0, expected an integer from 1"),
        ({"layers": (7,)}, "layers: got 7, expected 1 to 6, the layers of 'small'"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        benchmark(**settings)


def test_a_config_of_no_decoder_is_refused() -> None:
    with pytest.raises((TypeError, ValueError), match=r"^model: ") as refused:
        benchmark(BertConfig(is_decoder=True), layers=(1,))
    assert "\n" not in str(refused.value)


# -- the machine -------------------------------------------------------------------------------------------------------


def test_peaks_are_those_of_the_operations() -> None:
    flops = machine.matmul_peak(CPU, torch.float32, budget=0.0)
    seconds = machine.seconds_of(lambda: torch.randn(256, 256) @ torch.randn(256, 256), CPU)
    assert flops > 0.5 * 2 * 256**3 / seconds
    assert 1e8 < machine.copy_bandwidth(CPU, budget=0.0) < 1e13


def test_peak_memory_is_what_was_allocated_inside() -> None:
    with machine.PeakMemory(CPU) as peak:
        torch.ones(8 * 2**20)
        torch.ones(16 * 2**20)
    if peak.bytes is None:
        pytest.skip("this system does not let a process reset its peak of resident memory")
    assert 60e6 < peak.bytes < 90e6


def test_threads_are_set_inside_only() -> None:
    before = torch.get_num_threads()
    with machine.threads(before + 1) as count:
        assert count == torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_free_memory_heeds_a_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, text in {"current": "3000", "stat": "file 5\ninactive_file 500\n", "max": "10000"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    (tmp_path / "meminfo").write_text("MemTotal: 90 kB\nMemAvailable:    80 kB\n")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "meminfo")
    assert machine.free_memory(CPU) == 7500
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.free_memory(CPU) == 80 * 1024


def test_compiled_layers_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    compile_layers = Encoder.compile_layers

    def eagerly(self: Encoder, mode: str) -> None:
        made.append(mode)
        compile_layers(self, mode, backend="eager")

    monkeypatch.setattr(Encoder, "compile_layers", eagerly)
    [row] = benchmark(layers=(2,), chars=400, rounds=1, compile_encoder="reduce-overhead").rows()
    assert made == ["reduce-overhead"]
    assert row["seconds"]["encode"]["median"] > 0
    with pytest.raises(ValueError, match=r"^compile_encoder: got 'fast', expected one of default, "):
        EncodeSettings(layers=(2,), compile_encoder="fast")
