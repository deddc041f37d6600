"""Where the model that comes with this package lies."""

from __future__ import annotations

from pathlib import Path

EMBEDDED_NAME = "condense-tiny"
_PACKAGE = Path(__file__).resolve().parents[1]


def embedded_model_path() -> Path:
    """Folder of the embedded model: the checkout's ``models/condense-tiny``, else the installed package data.

    ``FileNotFoundError`` where neither holds a model; its message says how to make one.
    """
    checkout = _PACKAGE.parent
    candidates = [_PACKAGE / "_models" / EMBEDDED_NAME]
    # Only a checkout has a project file beside the package; site-packages/models would be somebody else's.
    if (checkout / "pyproject.toml").is_file():
        candidates.insert(0, checkout / "models" / EMBEDDED_NAME)
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder
    looked = " and ".join(map(str, candidates))
    raise FileNotFoundError(
        f"model: the embedded model {EMBEDDED_NAME!r} is not here (looked in {looked}); run 'make tiny' in a checkout, "
        "or name another model with --model"
    )
