"""``condense bench``: what compression costs on this machine, and how a server stands load."""

from __future__ import annotations

import json as json_format
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from condense_core.cli import bench_serve
from condense_core.cli.options import (
    DEFAULT_RATIO,
    CompileEncoder,
    Device,
    Dtype,
    Json,
    check_dtype,
    checked_device,
    model_source,
    parse_dtype,
    quiet_libraries,
)
from condense_core.cli.terminal import check_output, console, print_json, working

app = typer.Typer(help="Measure compression on this machine, and servers under load.")


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command("encode")
def encode(
    model: Annotated[
        str | None,
        typer.Option(
            help="Whose configuration: mistral-7b, a model folder, hub id, or a name of 'condense models list'.",
            show_default="the embedded model",
            metavar="MODEL",
        ),
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="Instead: a configuration as JSON, such as a config.json.", metavar="FILE")
    ] = None,
    chars: Annotated[int, typer.Option(help="Characters of each context.")] = 7000,
    chars_per_token: Annotated[float, typer.Option(help="Characters that a token stands for.")] = 4.0,
    layers: Annotated[
        str | None, typer.Option(help="Comma-separated depths of the encoder.", show_default="all layers")
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help="Comma-separated numbers of contexts at once.", show_default="1")
    ] = None,
    mixed: Annotated[
        bool, typer.Option("--mixed", help="Instead: 16 contexts of 500 to 7,000 characters, always the same.")
    ] = False,
    baseline: Annotated[
        bool, typer.Option("--baseline", help="Also time transformers' own layers on the padded batch, in turns.")
    ] = False,
    ratio: Annotated[int, typer.Option(help="Context tokens per soft token.")] = DEFAULT_RATIO,
    method: Annotated[str, typer.Option(help="Compressor: pool, mean or memory.")] = "pool",
    rounds: Annotated[int, typer.Option(help="Measurements of each row.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="as torch has it")] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Also write what was measured here, as JSON, while it grows.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw times by stage into this file.", metavar="FILE.png")] = None,
    device: Device = None,
    dtype: Dtype = None,
    compile_encoder: CompileEncoder = None,
    json: Json = False,
) -> None:
    """Time the encoder by stage on random weights, beside what the machine could do at best.

    The floor is the time of the matrix products at the machine's measured peak, or of reading the weights once,
    whichever is longer. A run that is cut off shows, and leaves in the file of -o, what was measured.
    """
    if model is not None and config is not None:
        raise ValueError("config: got --model too; expected one of them")
    if mixed and batch is not None:
        raise ValueError("batch: of contexts of one length; expected --mixed without it")
    check_dtype(dtype)
    if output is not None:
        check_output(output, "")
    if plot is not None:
        from condense_core.tasks.plot import check_picture

        check_picture(plot)
    depths, batches = parse_counts("layers", layers), parse_counts("batch", batch)
    with working("loading the configuration"):
        quiet_libraries()
        import torch

        from condense_core.profiling import configs
        from condense_core.profiling import encode as benchmark
        from condense_core.profiling.encode_output import as_tables, measured, plot_encode
        from condense_core.profiling.machine import threads as using_threads

        found = configs.read_config(config) if config is not None else configs.model_config(model or model_source(None))
        where = torch.device(checked_device(device) or ("cuda" if torch.cuda.is_available() else "cpu"))
        wanted = parse_dtype(dtype) or (torch.float32 if where.type == "cpu" else torch.bfloat16)
        settings = benchmark.EncodeSettings(
            layers=depths or (int(found.num_hidden_layers),),
            batches=batches or (1,),
            chars=chars,
            chars_per_token=chars_per_token,
            ratio=ratio,
            method=method,
            mixed=mixed,
            baseline=baseline,
            rounds=rounds,
            compile_encoder=compile_encoder,
        )
        name = Path(config).name if config is not None else Path(model or model_source(None)).name
        runner = benchmark.EncodeBenchmark(found, settings, name=name, device=where, dtype=wanted)
    with using_threads(threads):
        report: dict[str, Any] = runner.facts() | {"rows": []}
        try:
            with working("measuring"):
                for row in runner.rows():
                    report["rows"].append(row)
                    if "refused" in row:
                        print(f"note: {row['refused']}; left out", file=sys.stderr)
                    _write(output, report)
        finally:
            if json:
                print_json(report)
            elif measured(report):
                console().print(*as_tables(report))
    if plot is not None:
        plot_encode(report, plot)
    if not measured(report):
        raise ValueError("layers, batch: no row fits into the free memory; expected fewer layers or contexts")


app.command("serve")(bench_serve.serve)


def parse_counts(name: str, text: str | None) -> tuple[int, ...]:
    """``"8,16"`` as (8, 16), None as (); ``ValueError`` for what is no list of positive integers."""
    if text is None:
        return ()
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise ValueError(f"{name}: got {text!r}, expected integers of at least 1 separated by commas, such as 8,16")
    return found


def _write(output: str | None, report: dict[str, Any]) -> None:
    from condense_core.files.atomic import write_atomically

    if output is not None:
        write_atomically(output, (json_format.dumps(report, indent=1) + "\n").encode(), "the report")
