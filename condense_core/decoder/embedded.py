"""Where the model that comes with this package lies, and the compressors for public models that do."""

from __future__ import annotations

from pathlib import Path

EMBEDDED_NAME = "condense-tiny"
_PACKAGE = Path(__file__).resolve().parents[1]


def embedded_model_path() -> Path:
    """Folder of the embedded model: the checkout's ``models/condense-tiny``, else the installed package data.

    ``FileNotFoundError`` where neither holds a model; its message says how to make one.
    """
    candidates = [folder / EMBEDDED_NAME for folder in _model_folders()]
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder
    looked = " and ".join(map(str, candidates))
    raise FileNotFoundError(
        f"model: the embedded model {EMBEDDED_NAME!r} is not here (looked in {looked}); run 'make tiny' in a checkout, "
        "or name another model with --model"
    )


def shipped_compressors(method: str) -> list[Path]:
    """Checkpoints of ``method`` that come with this package for public models, which it does not ship themselves.

    They lie in ``models/<name>-condense/<method>``, beside the embedded model.
    """
    found = (path for folder in _model_folders() for path in sorted(folder.glob(f"*-condense/{method}")))
    return [path for path in found if (path / "compressor.json").is_file()]


def _model_folders() -> list[Path]:
    """The checkout's ``models`` first, then the installed package data."""
    checkout = _PACKAGE.parent
    # Only a checkout has a project file beside the package; site-packages/models would be somebody else's.
    return [*([checkout / "models"] if (checkout / "pyproject.toml").is_file() else []), _PACKAGE / "_models"]
