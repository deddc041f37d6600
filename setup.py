"""Build entry point. pyproject.toml holds what is declarative; this maps folders and builds the extension.

`kernels/` is installed as `condense_core.kernels`, never as a package `kernels`: a library of that name exists.
`models/` is installed as data of `condense_core._models`, so that a wheel answers without a download. A checkout whose
model is yet to be trained installs without it.

`csrc/` becomes the extension `condense_core._C`, from which torch is absent, in the build and in the binary. The
environment decides how:

    CONDENSE_EXTENSION   auto (default): built if there is a C++ compiler; 1: an error if there is none; 0: never
    CONDENSE_CUDA        auto (default): with its CUDA half if there is an nvcc; 1: an error if there is none; 0: never
    CONDENSE_CUDA_ARCHS  compute capabilities, "8.0;9.0"; default: all that nvcc knows of 8.0 8.6 8.9 9.0 10.0 12.0, and
                         PTX of the last one
    CONDENSE_DEBUG       1: assertions in the kernels, symbols, less optimisation

Sources are compiled in parallel (MAX_JOBS, default: the cores) and through ccache where that is installed.
"""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
# Every file isa_NAME.cpp compiles all kernels; the others are for any processor of the platform.
ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "avx512_bf16": ["-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512bf16"],
    "amx": ["-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
CUDA_TARGETS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


def choice(name: str, missing: str | None) -> bool:
    """Whether to build what the variable `name` (auto, 0 or 1) is about, if `missing` says what stands against it."""
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        sys.exit(f"error: {name}={value!r}, expected auto, 0 or 1")
    if value == "1" and missing:
        sys.exit(f"error: {name}=1, but {missing}")
    if value == "auto" and missing:
        print(f"condense_core: {missing}; building without it ({name}=auto)", file=sys.stderr)
    return value != "0" and not missing


def compiler() -> str | None:
    """The C++ compiler: CXX, or the first of the usual names."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((found for name in names if (found := shutil.which(name))), None)


def nvcc() -> str | None:
    """nvcc from CUDA_HOME, the path, or where CUDA installs itself."""
    folders = [Path(os.environ["CUDA_HOME"]) / "bin"] if os.environ.get("CUDA_HOME") else []
    places = [*folders, *os.environ.get("PATH", "").split(os.pathsep), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(map(str, places)))


def cuda_flags(nvcc: str) -> list[str]:
    """Code for each target, and PTX of the last for what comes after it."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    asked = os.environ.get("CONDENSE_CUDA_ARCHS")
    targets = asked.replace(",", ";").split(";") if asked else list(CUDA_TARGETS)
    names = [target.strip().replace(".", "") for target in targets if target.strip()]
    unknown = [name for name in names if f"compute_{name.rstrip('af')}" not in known]
    if asked and (unknown or not names):
        sys.exit(f"error: CONDENSE_CUDA_ARCHS={asked!r}, expected capabilities that {nvcc} knows, such as 8.0;9.0")
    names = [name for name in names if name not in unknown]
    codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    return [*codes, f"-gencode=arch=compute_{names[-1]},code=compute_{names[-1]}"]


class Build(build_ext):
    """Compiles every source with the flags it needs, several at a time."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link."""
        cxx, nvcc_path = compiler(), nvcc() if WITH_CUDA else None
        assert cxx is not None
        targets = cuda_flags(nvcc_path) if nvcc_path else []
        folder = Path(self.build_temp)
        jobs = [
            self.command(Path(source), folder, [nvcc_path or "", *targets] if source.endswith(".cu") else [cxx])
            for source in ext.sources
        ]
        workers = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        # The kernels of one instruction set take longest: first come the largest.
        jobs.sort(key=lambda job: -("isa_" in str(job[0]) or job[0].suffix == ".cu"))
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda job: self.compile(*job), jobs))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Linked beside the target and moved: a process that has the old one loaded keeps it.
        fresh = target.with_suffix(".new")
        objects = [str(output) for _, output, _ in jobs]
        if nvcc_path is not None:
            # The CUDA runtime goes in statically: it loads the driver when a kernel is first wanted, if there is one.
            linker = [nvcc_path, "-shared", "--cudart", "static", "-Xlinker", "-s"]
        elif sys.platform == "darwin":
            linker = [cxx, "-bundle", "-undefined", "dynamic_lookup"]
        else:
            linker = [cxx, "-shared", "-Wl,-s", "-lpthread"]
        self.run_tool([*linker, "-o", str(fresh), *objects])
        fresh.replace(target)

    def command(self, source: Path, folder: Path, compiler: list[str]) -> tuple[Path, Path, list[str]]:
        """What compiles `source`, and where to."""
        output = folder / source.with_suffix(source.suffix + ".o")
        debug = os.environ.get("CONDENSE_DEBUG") == "1"
        common = ["-std=c++20", "-Icsrc", "-O1" if debug else "-O3", *(["-g"] if debug else ["-DNDEBUG"])]
        host = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
        if source.suffix == ".cu":
            tool = [*compiler, *common, "--compiler-options", ",".join(host[:3]), "--threads", "0"]
        else:
            # A product and a sum may become one operation; nothing else of IEEE arithmetic is given up.
            tool = [*compiler, *common, *host, "-ffp-contract=fast", "-fno-math-errno"]
            tool += [f"-DCONDENSE_X86={int(X86)}"] if X86 else []
            if source.stem.startswith("isa_"):
                # GCC 12 warns of the undefined registers in its own intrinsics.
                tool += [*ISA_FLAGS[source.stem.removeprefix("isa_")], "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
            if source.name == "bindings.cpp":
                import pybind11

                tool += [f"-I{pybind11.get_include()}", *(f"-I{path}" for path in self.include_dirs)]
                tool += [f'-DCONDENSE_VERSION="{self.distribution.get_version()}"']
                tool += [f"-DCONDENSE_WITH_CUDA={int(WITH_CUDA)}"]
        cache = [found] if (found := shutil.which("ccache")) else []
        return source, output, [*cache, *tool, "-c", str(source), "-o", str(output)]

    def compile(self, source: Path, output: Path, command: list[str]) -> None:
        """Run it, unless the object is newer than everything it could be made from."""
        inputs = [*(ROOT / "csrc").rglob("*"), ROOT / "setup.py", ROOT / "condense_core" / "_version.py"]
        newest = max(path.stat().st_mtime for path in inputs)
        stamp = output.with_suffix(".command")
        if output.exists() and output.stat().st_mtime > newest and stamp.exists() and stamp.read_text() == str(command):
            return
        output.parent.mkdir(parents=True, exist_ok=True)
        print(f"compiling {source}", flush=True)
        self.run_tool(command)
        stamp.write_text(str(command))

    @staticmethod
    def run_tool(command: list[str]) -> None:
        """Run a compiler; what it says is shown when it fails."""
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: {' '.join(command)}\n{done.stdout}{done.stderr}")
        if done.stderr.strip():
            print(done.stderr, file=sys.stderr)


def sources() -> list[str]:
    """What the extension is made of, relative to the checkout."""
    kernels = [path for path in (ROOT / "csrc" / "cpu").glob("*.cpp") if X86 or path.stem in PORTABLE]
    cuda = (ROOT / "csrc" / "cuda").glob("*.cu") if WITH_CUDA else []
    shared = [ROOT / "csrc" / "bindings.cpp", ROOT / "csrc" / "condense" / "tensor.cpp"]
    return sorted(str(path.relative_to(ROOT)) for path in [*shared, *kernels, *cuda])


PORTABLE = ("isa_baseline", "dispatch", "parallel", "scratch")
has_models = (ROOT / "models").is_dir()
windows = "no build for Windows is written yet" if sys.platform == "win32" else None
no_compiler = None if compiler() else "there is no C++ compiler (CXX, g++, clang++ and c++ were tried)"
WITH_EXTENSION = choice("CONDENSE_EXTENSION", windows or no_compiler)
WITH_CUDA = WITH_EXTENSION and choice("CONDENSE_CUDA", None if nvcc() else "there is no nvcc (CUDA_HOME and PATH)")

setup(
    packages=[
        *find_packages(include=["condense_core", "condense_core.*"]),
        "condense_core.kernels",
        *(f"condense_core.{name}" for name in find_packages(include=["neurons", "neurons.*"])),
        *["condense_core._models"] * has_models,
    ],
    package_dir={
        "condense_core.kernels": "kernels",
        "condense_core.neurons": "neurons",
        **({"condense_core._models": "models"} if has_models else {}),
    },
    package_data={
        "condense_core": ["py.typed"],
        "condense_core.serving.http": ["page.html"],
        "condense_core.neurons": ["tiers.toml"],
        "condense_core.neurons.validating": ["page.html"],
        "condense_core.tasks": ["demo_text.txt", "wording.txt"],
        "condense_core.training": ["card.md"],
        "condense_core._models": ["condense-tiny/*", "condense-tiny/condense/*/*", "*-condense/*", "*-condense/*/*"],
    },
    ext_modules=[Extension("condense_core._C", sources())] if WITH_EXTENSION else [],
    cmdclass={"build_ext": Build},
)
