"""Build entry point. pyproject.toml holds what is declarative; two folders at the top of the checkout need the map
below.

`kernels/` is installed as `condense_core.kernels`, never as a package `kernels`: a library of that name exists.
`models/` is installed as data of `condense_core._models`, so that a wheel answers without a download. A checkout whose
model is yet to be trained installs without it.
"""

from pathlib import Path

from setuptools import find_packages, setup

has_models = Path(__file__).with_name("models").is_dir()

setup(
    packages=[
        *find_packages(include=["condense_core", "condense_core.*"]),
        "condense_core.kernels",
        *["condense_core._models"] * has_models,
    ],
    package_dir={"condense_core.kernels": "kernels"} | ({"condense_core._models": "models"} if has_models else {}),
    package_data={
        "condense_core": ["py.typed", "demo_text.txt"],
        "condense_core.training": ["card.md"],
        "condense_core._models": ["condense-tiny/*", "condense-tiny/condense/*/*"],
    },
)
