"""How many engines there are and where they may run: the application that Ray Serve deploys.

``build`` is the ``import_path`` of a configuration file for ``serve deploy`` (deploy/ray-serve.yaml is one).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ray import serve
from ray.serve import Application

from condense_core.serving.cluster.replica import EngineReplica
from condense_core.serving.engine import EngineLimits
from condense_core.serving.spec import EngineSpec

_HEALTH_PERIOD, _HEALTH_TIMEOUT = 2.0, 30.0
"""Seconds between two questions whether a replica is well, and for its answer. A process that ended is found by the
first, one that hangs by the second."""
_UPSCALE_DELAY, _DOWNSCALE_DELAY = 10.0, 300.0  # seconds of more, or of less, load: a replica loads a model first
_TRIES = 3  # a model that cannot be loaded three times cannot be loaded


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How many replicas, and what each takes of a machine.

    Attributes:
        replicas, max_replicas: how many at least and at most; None: no more than at least.
        target_ongoing: requests that wait or run in each, above which there are to be more replicas.
        num_gpus, num_cpus: that are reserved for each.
        stop_seconds: in which a replica that is to end finishes what it has.
    """

    replicas: int = 1
    max_replicas: int | None = None
    target_ongoing: float = 16.0
    num_gpus: float = 0.0
    num_cpus: float = 1.0
    stop_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name, least in (("replicas", 1), ("max_replicas", self.replicas)):
            value = getattr(self, name)
            if (value is not None or name == "replicas") and (type(value) is not int or value < least):
                raise ValueError(f"{name}: got {value!r:.40}, expected an integer of at least {least!r:.40}")
        for name in ("target_ongoing", "num_gpus", "num_cpus", "stop_seconds"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e6:
                raise ValueError(f"{name}: got {value!r:.40}, expected a number from 0")
        if not self.target_ongoing:
            raise ValueError("target_ongoing: got 0, expected more")

    @property
    def most(self) -> int:
        """Replicas at most."""
        return self.max_replicas or self.replicas


def application(spec: EngineSpec, scale: Scale) -> Application:
    """Replicas of an engine, as ``serve.run`` takes them."""
    counted: dict[str, Any] = {"num_replicas": scale.replicas}
    if scale.most > scale.replicas:
        counted = {
            "autoscaling_config": {
                "min_replicas": scale.replicas,
                "initial_replicas": scale.replicas,
                "max_replicas": scale.most,
                "target_ongoing_requests": scale.target_ongoing,
                "upscale_delay_s": _UPSCALE_DELAY,
                "downscale_delay_s": _DOWNSCALE_DELAY,
            }
        }
    deployment = serve.deployment(
        name="Engine",
        ray_actor_options={"num_cpus": scale.num_cpus, "num_gpus": scale.num_gpus},
        # An engine refuses what it cannot do in time, and says when to come again: it is to see more than it accepts.
        max_ongoing_requests=2 * spec.limits.max_requests,
        max_queued_requests=spec.limits.max_requests,  # while no replica is there
        graceful_shutdown_timeout_s=scale.stop_seconds,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=_HEALTH_PERIOD,
        health_check_timeout_s=_HEALTH_TIMEOUT,
        max_constructor_retry_count=_TRIES,
        **counted,
    )
    return deployment(EngineReplica).bind(spec)


def build(args: Mapping[str, Any]) -> Application:
    """The application of a configuration file.

    Args:
        args: fields of ``EngineSpec``, of its ``EngineLimits`` and of ``Scale``, each by its name.

    Raises:
        ValueError: a name or a value that none of them has.
    """
    kinds: tuple[type, ...] = (EngineLimits, Scale, EngineSpec)
    names: dict[type, set[str]] = {kind: {field.name for field in fields(kind)} - {"limits"} for kind in kinds}
    if unknown := sorted(set(args) - set().union(*names.values())):
        known = ", ".join(sorted(set().union(*names.values())))
        raise ValueError(f"args: got {unknown[0]!r:.60}, expected some of {known}")
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in args.items()}

    def of(kind: type) -> dict[str, Any]:
        return {name: given[name] for name in names[kind] & set(given)}

    return application(EngineSpec(**of(EngineSpec), limits=EngineLimits(**of(EngineLimits))), Scale(**of(Scale)))
