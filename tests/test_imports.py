"""What `import condense_core` costs, what it leaves alone, and what a built wheel installs."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import condense_core

CHECKOUT = Path(__file__).resolve().parents[1]

OPTIONAL = {
    *("transformers", "tokenizers", "safetensors", "triton", "typer", "rich", "accelerate", "matplotlib"),
    *("datasets", "fastapi", "uvicorn", "aiohttp", "bittensor", "vllm", "pytest", "peft"),
}


def run_python(code: str, *, path: list[Path] | None = None) -> str:
    """Run code with the checkout as working directory, and so, as `python -c` has it, first on sys.path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path:
        environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_pulls_in_nothing_beyond_the_standard_library() -> None:
    code = """
import sys
before = set(sys.modules)
import condense_core
names = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(names - sys.stdlib_module_names))
"""
    assert run_python(code) == "['condense_core']"


def test_the_light_names_pull_in_torch_and_nothing_optional() -> None:
    code = f"""
import sys, time
import torch
before, start = set(sys.modules), time.process_time()
import condense_core
condense_core.ops.attention_pool, condense_core.SoftTokens
seconds = time.process_time() - start
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
assert not new & {OPTIONAL}, sorted(new & {OPTIONAL})
print(seconds)
"""
    assert float(run_python(code)) < 0.3, "importing condense_core must cost at most 0.3 s over importing torch"


def test_public_names_are_listed_and_unknown_ones_refused() -> None:
    assert set(condense_core.__all__) <= set(dir(condense_core))
    assert condense_core.ops is importlib.import_module("condense_core.ops")
    with pytest.raises(AttributeError, match="module 'condense_core' has no attribute 'Condensor'"):
        condense_core.Condensor  # noqa: B018


def assert_kernels_is_the_library(output: str) -> None:
    location, marker = output.splitlines()
    assert not Path(location).resolve().is_relative_to(CHECKOUT / "kernels")
    assert marker == "True"


def test_a_library_called_kernels_still_imports_from_the_checkout(tmp_path: Path) -> None:
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("def get_kernel(): return 'the library'\n")
    code = """
import condense_core, condense_core.ops
import kernels
print(kernels.__file__)
print(kernels.get_kernel() == 'the library')
"""
    assert_kernels_is_the_library(run_python(code, path=[tmp_path]))


@pytest.mark.skipif(importlib.util.find_spec("kernels") is None, reason="the Hugging Face library is not installed")
def test_the_hugging_face_kernels_library_still_imports_from_the_checkout() -> None:
    code = """
import condense_core, condense_core.ops
import kernels
print(kernels.__file__)
print(callable(kernels.get_kernel))
"""
    assert_kernels_is_the_library(run_python(code))


def test_the_checkouts_kernels_are_no_top_level_package(tmp_path: Path) -> None:
    """Without such a library, `import kernels` fails as it does anywhere, and this project's are where they belong."""
    code = """
import sys
sys.path = [entry for entry in sys.path if "site-packages" not in entry]
try:
    import kernels
except ModuleNotFoundError as error:
    print(error.name)
"""
    assert run_python(code) == "kernels"
    assert run_python("import condense_core.kernels as k; print(k.__name__)") == "condense_core.kernels"


@pytest.mark.slow
def test_a_wheel_installs_condense_core_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(
        ".*",
        "build",
        "dist",
        "*.egg-info",
        "__pycache__",
        "runs",
    )
    shutil.copytree(CHECKOUT, source, ignore=ignored)
    for name in ("tests", "bench", "tools"):  # packages that a careless configuration would pick up
        (source / name).mkdir(exist_ok=True)
        (source / name / "__init__.py").touch()
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--quiet",
    ]
    done = subprocess.run(
        [*command, "--wheel-dir", str(tmp_path), str(source)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {
        "condense_core",
        f"condense_core-{condense_core.__version__}.dist-info",
    }
    assert "condense_core/py.typed" in names
    assert "condense_core/ops/reference/attention_pool.py" in names
    assert "condense_core/kernels/attention_pool.py" in names
    for part in ("config.json", "model.safetensors", "tokenizer.json", "condense/pool/compressor.safetensors"):
        assert f"condense_core/_models/condense-tiny/{part}" in names
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert "condense = condense_core.cli:main" in zipfile.ZipFile(wheel).read(entry_points).decode()
