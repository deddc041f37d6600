"""The GPU's program for the encoder, gone through on the CPU: every way is measured, and goals are an H200's alone."""

import json
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def encoder():
    """The module of `bench/`, which is no installed package."""
    sys.path.insert(0, str(CHECKOUT))
    try:
        from bench import encode_gpu

        yield encode_gpu
    finally:
        sys.path.remove(str(CHECKOUT))


def test_every_way_is_measured_and_written(encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from condense_core.compressor.encoder import Encoder

    made: list[str] = []
    compile_layers = Encoder.compile_layers

    def eagerly(self, mode: str) -> None:  # the compiler takes minutes and is not what is tested
        made.append(mode)
        compile_layers(self, mode, backend="eager")

    monkeypatch.setattr(Encoder, "compile_layers", eagerly)
    assert encoder.main(["--smoke", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "encoder-smoke.json").read_text())
    rows = [(row["layers"], row["mixed"], row["compile_encoder"]) for row in document["rows"]]
    ways = ["eager", "default", "reduce-overhead", "max-autotune-no-cudagraphs"]
    assert rows == [(layers, mixed, way) for layers in (1, 2) for mixed in (False, True) for way in ways]
    assert all(row["seconds"]["total"]["median"] > 0 for row in document["rows"]), document["rows"]
    assert made == ways[1:] * 4
    assert [goal["met"] for goal in document["goals"]] == [None] * 3


def row(layers: int, mixed: bool, way: str, ms: float, share: float) -> dict:
    times = {"total": {"median": ms * 1e-3}}
    return {"layers": layers, "mixed": mixed, "compile_encoder": way, "seconds": times, "share_of_floor": share}


def test_the_best_way_is_judged_on_an_h200_alone(encoder) -> None:
    rows = [row(8, False, "eager", 15.0, 0.5), row(8, False, "default", 13.0, 0.6), row(32, False, "eager", 50.0, 0.6)]
    rows += [
        row(32, True, "eager", 700.0, 0.7),
        {"layers": 32, "mixed": True, "compile_encoder": "default", "error": "E"},
    ]
    verdicts = encoder.verdicts(rows, "NVIDIA H200")
    assert [(v["met"], v["way"]) for v in verdicts] == [(True, "default"), (False, "eager"), (True, "eager")]
    assert all(v["met"] is None for v in encoder.verdicts(rows, "NVIDIA H100 80GB HBM3"))
    assert "not measured: E" in encoder.line(rows[-1])
