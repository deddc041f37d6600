"""``condense serve``: compression over HTTP."""

from __future__ import annotations

import sys
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from condense_core.cli.options import (
    CompileEncoder,
    Compressors,
    Device,
    Dtype,
    Model,
    PlainLogs,
    Threads,
    check_compressor,
    check_dtype,
    checked_device,
    quiet_libraries,
)
from condense_core.cli.terminal import extra_missing, working
from condense_core.serving.cluster import environment

if TYPE_CHECKING:
    from condense_core.serving.cluster.session import Session
    from condense_core.serving.prometheus import PrometheusObserver
    from condense_core.serving.service import Service
    from condense_core.serving.spec import EngineSpec

ENGINES = ("local", "ray")


def serve(
    model: Model = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Compressors to offer, the default one first, such as mixed,select.",
            show_default="those that the model has, and select",
        ),
    ] = None,
    compressor: Compressors = None,
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
    threads: Threads = None,
    plain_logs: PlainLogs = False,
    device: Device = None,
    dtype: Dtype = None,
    compile_encoder: CompileEncoder = None,
    engine: Annotated[
        str, typer.Option(help="local: in this process; ray: replicas, each a process, on one machine or on many.")
    ] = "local",
    replicas: Annotated[
        int | None,
        typer.Option(help="With --engine ray: how many at least.", min=1, show_default="one for each GPU, or 2"),
    ] = None,
    max_replicas: Annotated[
        int | None,
        typer.Option(help="With --engine ray: how many at most, under load.", min=1, show_default="--replicas"),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of a Ray cluster, or auto.", show_default="one that starts and ends with this"),
    ] = None,
    ray_app: Annotated[
        str | None,
        typer.Option(
            help="Use the replicas that 'serve deploy' has started under this name, and start none.", show_default=False
        ),
    ] = None,
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
    if engine not in ENGINES:
        raise ValueError(f"--engine: got {engine!r:.40}, expected one of {', '.join(ENGINES)}")
    for name, given in (("replicas", replicas), ("max-replicas", max_replicas), ("ray-address", ray_address)):
        if given is not None and engine != "ray":
            raise ValueError(f"--{name}: got {given!r}, expected --engine ray beside it")
    if ray_app is not None and (ray_address is None or replicas is not None or max_replicas is not None):
        raise ValueError("--ray-app: expected --ray-address beside it, and no --replicas or --max-replicas")
    bound = bound_socket(host, port)
    with working("loading the model"), ExitStack() as until_end:
        quiet_libraries()

        from condense_core.serving.engine import EngineLimits
        from condense_core.serving.http.app import create_app
        from condense_core.serving.http.server import Server
        from condense_core.serving.spec import EngineSpec

        limits = EngineLimits(
            max_requests=max_requests,
            max_chars=max_chars,
            max_batch_tokens=batch_tokens,
            timeout=timeout,
            cache_bytes=cache_mb * 2**20,
        )
        spec = EngineSpec(
            model=model,
            methods=None if methods is None else tuple(name.strip() for name in methods.split(",")),
            compressors=tuple(compressor or ()),
            device=device,
            dtype=dtype,
            compile_encoder=compile_encoder,
            prunes=prune,
            answers=answers,
            threads=threads,
            limits=limits,
        )
        if engine == "ray":
            session = _session(spec, replicas, max_replicas, ray_address, ray_app, stop_seconds)
            until_end.enter_context(closing(session))
            service, observer, what = _replicas(session)
        else:
            service, observer, what = _local(spec)
        to_end = until_end.pop_all()
    # A character is at most six bytes of JSON.
    http_limits = HttpLimits(max_body_bytes=max(8 * 2**20, 6 * service.models()[0]["limits"]["max_chars"]))
    app = create_app(
        service, observer=observer, keys=known, limits=http_limits, page=answers, stop_seconds=stop_seconds
    )
    logs.configure(plain=plain_logs)
    address = bound.getsockname()
    url = f"{'http' if tls_cert is None else 'https'}://{host}:{address[1]}"

    def started() -> None:
        print(f"{what}; {url}", file=sys.stderr, flush=True)
        if known is None and host not in ("127.0.0.1", "localhost", "::1"):
            print("note: no --keys, so that whoever reaches this address may ask", file=sys.stderr, flush=True)

    server = Server(
        app, limits=http_limits, stop_seconds=stop_seconds, certificate=tls_cert, key=tls_key, started=started
    )
    with to_end:
        server.run(sockets=[bound])


def _local(spec: EngineSpec) -> tuple[Service, PrometheusObserver, str]:
    """An engine of this process, and what it is."""
    from condense_core.serving.engine import CompressionEngine
    from condense_core.serving.prometheus import PrometheusObserver
    from condense_core.serving.service import LocalService

    checked_device(spec.device)
    served = spec.load()
    observer = PrometheusObserver(served.device)
    service = LocalService(CompressionEngine(served, limits=spec.limits, observer=observer))
    return service, observer, f"{served.model_id} on {served.device}: {', '.join(served.condensers)}"


def _session(
    spec: EngineSpec,
    replicas: int | None,
    max_replicas: int | None,
    address: str | None,
    app: str | None,
    stop_seconds: float,
) -> Session:
    """Replicas that are started, or found, on a cluster."""
    environment.prepare(address)
    with extra_missing("ray"):
        from condense_core.serving.cluster.session import deployed, joined
    from condense_core.serving.spec import EngineSpec

    if app is not None and address is not None:
        if spec != EngineSpec():
            raise ValueError("--ray-app: its replicas have a model and limits, expected no options of these")
        return joined(app, address=address)
    # A replica works in a folder of its own.
    model = spec.model if spec.model is None or not Path(spec.model).exists() else str(Path(spec.model).absolute())
    spec = replace(spec, model=model, compressors=tuple(str(Path(folder).absolute()) for folder in spec.compressors))
    return deployed(spec, replicas=replicas, max_replicas=max_replicas, stop_seconds=stop_seconds, address=address)


def _replicas(session: Session) -> tuple[Service, PrometheusObserver, str]:
    """The engines of a cluster, and what they are."""
    from condense_core.serving.cluster.figures import FrontObserver
    from condense_core.serving.cluster.service import RayService

    observer, facts = FrontObserver(), session.first.facts
    service = RayService(session.handle, session.first, observer=observer, close=session.close)
    what = f"{facts['id']} on {facts['device']}, replicas on Ray at {session.address}: {', '.join(facts['methods'])}"
    return service, observer, what
