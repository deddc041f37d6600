"""Ray's environment variables for a cluster that one process starts for itself; this module does not import Ray."""

from __future__ import annotations

import os
import secrets

OWN_CLUSTER = {
    # Whoever reaches Ray's ports may run code. With this value Ray listens on the loopback address, on any system.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Ray's workers would give way to every other process of the machine (15), and replicas are what it is there for.
    "RAY_worker_niceness": "0",
}


def prepare() -> None:
    """Set the variables that are not set; called before Ray is imported, which reads some of them then.

    Only whoever has the token may use the cluster, so that other users of the machine cannot. Ray itself would write
    one into the home folder, which a service may not have.
    """
    for name, value in OWN_CLUSTER.items():
        os.environ.setdefault(name, value)
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
