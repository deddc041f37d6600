"""``condense doctor``: versions, devices, optional extras, and which backend can run each op and why not."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from condense_core._version import __version__
from condense_core.cli.options import Json
from condense_core.cli.terminal import console, print_json, working
from condense_core.decoder.catalog import CATALOG, cached_model
from condense_core.decoder.embedded import embedded_model_path

if TYPE_CHECKING:
    from rich.console import Console

DISTRIBUTION = "condense-core"
_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy")
# The flags that decide which CPU kernels can run, as Linux spells them for x86 and Arm.
_CPU_FLAGS = (
    "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_bf16", "amx_int8", "asimd", "asimddp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip


def doctor(json: Json = False) -> None:
    """Show versions, devices, optional extras and the backends of every op, and why one is missing."""
    with working("looking around"):
        report = examine()
    if json:
        print_json(report)
    else:
        render(report, console())


def examine() -> dict[str, Any]:
    """Everything ``condense doctor --json`` prints, as plain values; what is missing is reported, not raised."""
    return {
        "versions": versions(),
        "platform": platform_facts(),
        "devices": devices(),
        "attention": attention(),
        "extension": extension(),
        "extras": extras(),
        "embedded_model": embedded_model(),
        "public_models": public_models(),
        "ops": ops_backends(),
    }


def versions() -> dict[str, str | None]:
    """Versions of this package, Python and the core dependencies; ``None`` for what is not installed."""
    own: dict[str, str | None] = {"condense_core": __version__, "python": platform.python_version()}
    return own | {name: _installed(name) for name in _PACKAGES}


def platform_facts() -> dict[str, Any]:
    """Operating system, processor, and how many of its cores and which of its vector units are usable."""
    import torch

    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": platform.platform(),
        "machine": platform.machine(),
        "cpu": info.get("model name") or platform.processor() or "unknown",
        "cpu_count": os.cpu_count(),
        "usable_cpus": affinity,
        "torch_threads": torch.get_num_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_flags": [flag for flag in _CPU_FLAGS if flag in flags],
    }


def devices() -> dict[str, Any]:
    """The devices torch can use, the one taken by default, and why there is no CUDA device where there is none."""
    import torch

    found: list[dict[str, Any]] = []
    why_not: str | None = None
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found.append(
                {
                    "device": f"cuda:{index}",
                    "name": properties.name,
                    "capability": f"{properties.major}.{properties.minor}",
                    "memory_bytes": properties.total_memory,
                }
            )
    elif torch.version.cuda is None:
        why_not = f"torch {torch.__version__} was built without CUDA"
    else:
        why_not = f"torch was built for CUDA {torch.version.cuda}, but no usable NVIDIA device or driver was found"
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": "Apple GPU", "capability": None, "memory_bytes": None})
    found.append({"device": "cpu", "name": "CPU", "capability": None, "memory_bytes": _memory_bytes()})
    return {"default": "cuda" if torch.cuda.is_available() else "cpu", "found": found, "why_no_cuda": why_not}


def attention() -> dict[str, str | None]:
    """Which attention runs, and whether flash-attn could: its version where it imports, else why not."""
    version, why_not = None, None
    try:
        module = importlib.import_module("flash_attn")
        version = str(getattr(module, "__version__", "unknown"))
    except ModuleNotFoundError:
        why_not = "not installed"
    except Exception as error:  # a build for another torch fails with whatever its loader raises
        why_not = f"installed, but does not import ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    return {"chosen": "sdpa", "flash_attn": version, "why_no_flash_attn": why_not}


def extension() -> dict[str, Any]:
    """The compiled extension: its instruction sets on this processor, the one in use, its CUDA half.

    Or why it is not used.
    """
    from condense_core.ops import native

    if why_not := native.missing():
        return {"loaded": False, "why_not": why_not, "instruction_set": None, "instruction_sets": [], "cuda": False}
    module = native.extension()
    return {
        "loaded": True,
        "why_not": None,
        "instruction_set": module.cpu.instruction_set(),
        "instruction_sets": module.cpu.instruction_sets(),
        "cuda": module.has_cuda,
    }


def extras() -> dict[str, dict[str, str | None]]:
    """Per optional extra, its packages with the installed version or ``None``; empty without the package's metadata."""
    from packaging.requirements import Requirement

    try:
        metadata = importlib.metadata.metadata(DISTRIBUTION)
        requirements = [Requirement(line) for line in importlib.metadata.requires(DISTRIBUTION) or []]
    except importlib.metadata.PackageNotFoundError:
        return {}
    table: dict[str, dict[str, str | None]] = {}
    for extra in metadata.get_all("Provides-Extra") or []:
        table[extra] = {
            requirement.name: _installed(requirement.name)
            for requirement in requirements
            if requirement.marker is not None
            and requirement.marker.evaluate({"extra": extra})
            and not requirement.marker.evaluate({"extra": ""})
        }
    return table


def embedded_model() -> dict[str, Any]:
    """Where the embedded model lies, how large it is and which trained compressors it has, or why it is missing."""
    try:
        folder = embedded_model_path()
    except FileNotFoundError as error:
        return {"path": None, "bytes": None, "compressors": [], "why_not": str(error)}
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    trained = sorted(path.parent.name for path in (folder / "condense").glob("*/compressor.json"))
    return {"path": str(folder), "bytes": size, "compressors": trained, "why_not": None}


def public_models() -> list[dict[str, Any]]:
    """Of each model that ``condense models`` knows, the folder and the size, or why it cannot be used."""
    try:
        cached = {name: cached_model(model) for name, model in CATALOG.items()}
    except (OSError, ValueError) as error:
        why_not = f"cannot be looked for: {error}"
        return [{"name": name, "path": None, "bytes": 0, "why_not": why_not} for name in CATALOG]
    return [
        {
            "name": name,
            "path": str(found.path) if found.problem is None else None,
            "bytes": found.num_bytes,
            "why_not": found.problem,
        }
        for name, found in cached.items()
    ]


def ops_backends() -> dict[str, Any]:
    """The backend table, and the backend that ``CONDENSE_BACKEND`` asks for."""
    from condense_core.ops.backends import REGISTRY
    from condense_core.ops.registry import requested_backend

    requested, problem = None, None
    try:
        requested = requested_backend()
    except ValueError as error:
        problem = str(error)
    rows = [
        {"op": row.op, "backend": row.backend, "available": row.available, "why_not": row.why_not}
        for row in REGISTRY.table()
    ]
    return {"requested": requested, "problem": problem, "backends": rows}


def render(report: dict[str, Any], console: Console) -> None:
    """Print ``examine()`` as tables for people."""
    from rich.markup import escape

    def say(line: str) -> None:
        console.print(escape(line), soft_wrap=True)

    host, found = report["platform"], report["devices"]
    _print_table(console, "Versions", [(name, value or "not installed") for name, value in report["versions"].items()])
    processor = (
        f"{host['cpu']}, {host['usable_cpus']} of {host['cpu_count']} cores usable, {host['torch_threads']} threads"
    )
    rows = [
        ("system", host["system"]),
        ("processor", processor),
        ("vector units", f"{host['torch_cpu_capability']} in torch; {' '.join(host['cpu_flags']) or 'flags unknown'}"),
    ]
    rows += [(entry["device"], _describe_device(entry)) for entry in found["found"]]
    if found["why_no_cuda"]:
        rows.append(("cuda", f"none: {found['why_no_cuda']}"))
    rows.append(("default device", found["default"]))
    flash = report["attention"]
    if flash["flash_attn"]:
        flash_text = f"flash_attn {flash['flash_attn']} is there"
    else:
        flash_text = f"flash_attn: {flash['why_no_flash_attn']}"
    rows.append(("attention", f"{flash['chosen']} ({flash_text})"))
    compiled = report["extension"]
    if compiled["loaded"]:
        half = "with its CUDA half" if compiled["cuda"] else "without CUDA"
        sets = ", ".join(compiled["instruction_sets"])
        rows.append(("extension", f"{compiled['instruction_set']} (of {sets}), built {half}"))
    else:
        rows.append(("extension", f"none: {compiled['why_not']}"))
    _print_table(console, "Machine", rows)

    _print_table(
        console,
        "Optional extras",
        [(f"{DISTRIBUTION}[{name}]", _describe_extra(packages)) for name, packages in report["extras"].items()]
        or [("unknown", f"{DISTRIBUTION} is not installed; its metadata lists the extras")],
    )
    model = report["embedded_model"]
    if model["path"]:
        compressors = ", ".join(model["compressors"]) or "none"
        say(f"Embedded model: {model['path']}, {model['bytes'] / 1e6:.1f} MB, trained compressors: {compressors}")
    else:
        say(f"Embedded model: none ({model['why_not'].removeprefix('model: ')})")
    for entry in report["public_models"]:
        if entry["path"]:
            say(f"Public model {entry['name']}: {entry['path']}, {entry['bytes'] / 1e6:.0f} MB")
        else:
            say(f"Public model {entry['name']}: {entry['why_not']} (condense models get {entry['name']})")
    console.print()
    _render_backends(report["ops"], console)
    if report["ops"]["problem"]:
        say(f"Problem: {report['ops']['problem']}")
    elif report["ops"]["requested"]:
        say(f"CONDENSE_BACKEND asks for {report['ops']['requested']!r} everywhere")


def _render_backends(ops: dict[str, Any], console: Console) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from condense_core.ops.registry import BACKENDS, no_implementation

    rows: dict[str, list[str]] = {}
    reasons: dict[str, None] = {}  # each once, however many ops it stops
    for entry in ops["backends"]:
        state = "[green]yes[/]"
        if entry["why_not"] == no_implementation(entry["op"], entry["backend"]):
            state = "-"
        elif not entry["available"]:
            state = "no"
            reasons[f"{entry['backend']}: {entry['why_not']}"] = None
        rows.setdefault(entry["op"], []).append(state)
    table = Table("op", *BACKENDS, title="Backends, most preferred first", title_justify="left", box=box.SIMPLE)
    for op, states in rows.items():
        table.add_row(op, *states)
    console.print(table)
    for reason in reasons:
        console.print(f"  no {escape(reason)}")
    console.print("  - not in this version\n")


def _print_table(console: Console, title: str, rows: list[tuple[str, str]]) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False, box=box.SIMPLE)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(escape(name), escape(value))
    console.print(table)


def _describe_device(entry: dict[str, Any]) -> str:
    parts = [entry["name"]]
    if entry["capability"]:
        parts.append(f"compute capability {entry['capability']}")
    if entry["memory_bytes"]:
        parts.append(f"{entry['memory_bytes'] / 2**30:.1f} GiB")
    return ", ".join(parts)


def _describe_extra(packages: dict[str, str | None]) -> str:
    if not packages:
        return "nothing to install on this platform"
    missing = [name for name, version in packages.items() if version is None]
    present = ", ".join(f"{name} {version}" for name, version in packages.items() if version is not None)
    if not missing:
        return f"installed: {present}"
    return f"missing: {', '.join(missing)}" + (f"; installed: {present}" if present else "")


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpuinfo() -> dict[str, str]:
    """The first processor's entry of ``/proc/cpuinfo``; empty where there is none."""
    try:
        first = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
