"""Ray's environment variables for a cluster that one process starts for itself; this module does not import Ray."""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import tempfile
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

OWN_CLUSTER = {
    # Whoever reaches Ray's ports may run code. With this value Ray listens on the loopback address, on any system.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Ray's workers would give way to every other process of the machine (15), and replicas are what it is there for.
    "RAY_worker_niceness": "0",
}


def prepare(address: str | None) -> None:
    """Set the variables that are not set; called before Ray is imported, which reads some of them then.

    address: of a cluster to join, whose secrets the environment must hold; None: one is to be started.

    Only whoever has the token may use the cluster, so that other users of the machine cannot. Ray itself would write
    one into the home folder, which a service may not have. A replica also has a port that no token guards, on all
    addresses, where what comes is unpickled: both sides of every connection must show the cluster's own certificate.
    """
    if address is not None and not address.startswith(("127.", "localhost:")):
        return
    for name, value in OWN_CLUSTER.items():
        os.environ.setdefault(name, value)
    if address is not None:
        return
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    if "RAY_USE_TLS" not in os.environ:
        folder = Path(tempfile.mkdtemp(prefix="condense-ray-"))  # for this user only
        atexit.register(_forget, folder, os.getpid())
        os.environ |= certificate(folder)


def certificate(folder: Path) -> dict[str, str]:
    """Ray's variables for TLS with a new certificate of this machine, signed by itself, which is written to files."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "condense cluster")])
    names = [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1")), x509.IPAddress(ip_address("::1"))]
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=3650))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(private, hashes.SHA256())
    )
    public, key = folder / "cluster.crt", folder / "cluster.key"
    public.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    own = {"RAY_TLS_SERVER_CERT": str(public), "RAY_TLS_SERVER_KEY": str(key), "RAY_TLS_CA_CERT": str(public)}
    return {"RAY_USE_TLS": "1", **own}


def _forget(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not a process that was forked since
        shutil.rmtree(folder, ignore_errors=True)
