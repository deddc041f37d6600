"""``condense serve``: compression over HTTP."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from condense_core.cli.options import (
    Device,
    Dtype,
    Model,
    check_compressor,
    check_dtype,
    checked_device,
    model_source,
    parse_dtype,
    quiet_libraries,
)
from condense_core.cli.terminal import extra_missing, working


def serve(
    model: Model = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Compressors to offer, the default one first, such as mixed,select.",
            show_default="those that the model has, and select",
        ),
    ] = None,
    compressor: Annotated[
        list[str] | None,
        typer.Option(help="Folder of a trained compressor. May be repeated.", metavar="FOLDER", show_default=False),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one.", min=0, max=65535)] = 8000,
    keys: Annotated[
        Path | None, typer.Option(help="TOML file of API keys, as --new-key prints.", show_default="everybody may ask")
    ] = None,
    new_key: Annotated[
        str | None, typer.Option(help="Make a key of this name, print it and its lines for --keys, and exit.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate in PEM, for https.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key.", show_default="in the certificate")] = None,
    max_chars: Annotated[int, typer.Option(help="Of one text.", min=1)] = 2 * 2**20,
    max_requests: Annotated[int, typer.Option(help="That wait at once.", min=1)] = 512,
    batch_tokens: Annotated[int, typer.Option(help="Tokens that are read together on a GPU.", min=1)] = 32_768,
    timeout: Annotated[float, typer.Option(help="Seconds for requests that name none.", min=0.001)] = 60.0,
    cache_mb: Annotated[int, typer.Option(help="For results of requests that come again.", min=0)] = 256,
    stop_seconds: Annotated[float, typer.Option(help="To finish what was accepted, when told to end.", min=0)] = 30.0,
    prune: Annotated[bool, typer.Option(help="Offer pruned KV caches.")] = True,
    answers: Annotated[bool, typer.Option(help="Offer answers by the model, which the page at / shows.")] = True,
    threads: Annotated[int | None, typer.Option(help="Of the CPU.", min=1, show_default="one for each core")] = None,
    plain_logs: Annotated[bool, typer.Option("--plain-logs", help="Logs for people instead of JSON.")] = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Serve compression over HTTP until Ctrl-C or SIGTERM: what was accepted by then is finished."""
    with extra_missing("serve"):
        from condense_core.serving.http import logs
        from condense_core.serving.http.guard import HttpLimits
        from condense_core.serving.http.server import bound_socket, check_certificate
        from condense_core.serving.keys import Keys
        from condense_core.serving.keys import new_key as make_key
    if new_key is not None:
        key, lines = make_key(new_key)
        print(f"{key}\n\n{lines}", end="")
        return
    known = None if keys is None else Keys.load(keys)
    if tls_key is not None and tls_cert is None:
        raise ValueError("--tls-key: got no --tls-cert, expected both")
    if tls_cert is not None:
        check_certificate(tls_cert, tls_key)
    for folder in compressor or ():
        check_compressor(folder)
    check_dtype(dtype)
    bound = bound_socket(host, port)
    with working("loading the model"):
        quiet_libraries()
        import torch

        from condense_core.serving.engine import CompressionEngine, EngineLimits
        from condense_core.serving.http.app import create_app
        from condense_core.serving.http.server import Server
        from condense_core.serving.prometheus import PrometheusObserver
        from condense_core.serving.served import ServedModel
        from condense_core.serving.service import LocalService

        if threads is not None:
            torch.set_num_threads(threads)
        served = ServedModel.load(
            model_source(model),
            None if methods is None else [name.strip() for name in methods.split(",")],
            device=checked_device(device),
            dtype=parse_dtype(dtype),
            compressors=compressor or (),
            prunes=prune,
            answers=answers,
        )
    limits = EngineLimits(
        max_requests=max_requests,
        max_chars=max_chars,
        max_batch_tokens=batch_tokens,
        timeout=timeout,
        cache_bytes=cache_mb * 2**20,
    )
    http_limits = HttpLimits(max_body_bytes=max(8 * 2**20, 6 * max_chars))  # a character is at most six bytes of JSON
    observer = PrometheusObserver(served.device)
    service = LocalService(CompressionEngine(served, limits=limits, observer=observer))
    app = create_app(
        service, observer=observer, keys=known, limits=http_limits, page=answers, stop_seconds=stop_seconds
    )
    logs.configure(plain=plain_logs)
    address = bound.getsockname()
    url = f"{'http' if tls_cert is None else 'https'}://{host}:{address[1]}"

    def started() -> None:
        print(
            f"{served.model_id} on {served.device}: {', '.join(served.condensers)}; {url}", file=sys.stderr, flush=True
        )
        if known is None and host not in ("127.0.0.1", "localhost", "::1"):
            print("note: no --keys, so that whoever reaches this address may ask", file=sys.stderr, flush=True)

    server = Server(
        app, limits=http_limits, stop_seconds=stop_seconds, certificate=tls_cert, key=tls_key, started=started
    )
    server.run(sockets=[bound])
