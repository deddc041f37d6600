"""docs/ops.md is what its generator writes; the files that it names exist, and those of an op name each other."""

from pathlib import Path

import pytest

from condense_core.ops import overview
from condense_core.ops.backends import REGISTRY

CHECKOUT = Path(__file__).resolve().parents[2]
STEMS = overview.stems(CHECKOUT)
BACKEND_FILES = {"triton": "Triton kernel", "cpu": "CPU backend", "cuda": "CUDA backend", "reference": "specification"}


@pytest.fixture(params=STEMS, ids=lambda stem: stem.name)
def stem(request: pytest.FixtureRequest) -> overview.Stem:
    return request.param


def kernels(stem: overview.Stem) -> list[str]:
    return [path for kind, path in stem.files.items() if kind.endswith("kernel")]


def test_the_document_is_what_the_generator_writes() -> None:
    written = (CHECKOUT / "docs" / "ops.md").read_text()
    assert written == overview.document(CHECKOUT), "run python -m condense_core.ops.overview > docs/ops.md"


def test_every_op_has_a_formula() -> None:
    assert set(overview.FORMULAS) == set(REGISTRY.ops)


def test_every_file_exists(stem: overview.Stem) -> None:
    paths = [*stem.files.values(), *stem.tests, stem.benchmark]
    assert [path for path in paths if not (CHECKOUT / path).exists()] == []


def test_the_table_of_backends_has_what_lies_in_the_folders(stem: overview.Stem) -> None:
    for op in stem.ops:
        assert set(REGISTRY.backends(op)) == {name for name, kind in BACKEND_FILES.items() if kind in stem.files}


def test_no_file_lies_in_a_folder_of_ops_without_an_op() -> None:
    known = {stem.name for stem in STEMS}
    for folder in ("condense_core/ops/cpu", "condense_core/ops/cuda", "csrc/cpu/kernels"):
        assert {path.stem for path in (CHECKOUT / folder).glob("[!_]*.*")} <= known, folder


def test_each_backend_is_tested_under_its_stem(stem: overview.Stem) -> None:
    folders = {str(Path(path).parent) for path in stem.tests}
    expected = {"Triton kernel": "tests/kernels", "CPU kernel": "tests/csrc", "CUDA kernel": "tests/csrc/cuda"}
    assert {"tests/ops", *(folder for kind, folder in expected.items() if kind in stem.files)} <= folders


def test_the_public_module_names_the_specification_and_the_kernels(stem: overview.Stem) -> None:
    text = (CHECKOUT / stem.files["public function"]).read_text()
    assert [path for path in (stem.files["specification"], *kernels(stem)) if path not in text] == []


def test_the_specification_names_the_public_function_and_the_kernels(stem: overview.Stem) -> None:
    text = (CHECKOUT / stem.files["specification"]).read_text()
    public = stem.files["public function"]
    assert f"condense_core.ops.{Path(public).stem}`" in text or public in text
    assert [path for path in kernels(stem) if path not in text] == []


def test_kernels_name_the_specification(stem: overview.Stem) -> None:
    for path in kernels(stem):
        assert stem.files["specification"] in (CHECKOUT / path).read_text(), path
