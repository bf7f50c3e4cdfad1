"""The secrets of one deployment: TLS key and certificate, and the token.

They are files of mode 0600 in the run directory and nowhere else: not in argv, environment, pickles or logs.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from mii_hpc.rundir import RunDir, check_private, write_atomically

TLS_NAME = "mii-hpc"
"""The name in every certificate. Clients pin the certificate itself, so hosts and addresses may change."""

_LIFETIME = timedelta(days=3650)  # the certificate dies with its deployment; only clock skew must not matter


@dataclass(frozen=True)
class Credentials:
    """Key, certificate and token of a deployment. PEM bytes; never shown by repr()."""

    certificate: bytes = field(repr=False)
    token: str = field(repr=False)
    key: bytes = field(repr=False, default=b"")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate, in hexadecimal."""
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes

        return x509.load_pem_x509_certificate(self.certificate).fingerprint(hashes.SHA256()).hex()


def create(run: RunDir) -> Credentials:
    """Make new credentials for a run and write them to its directory."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, TLS_NAME)])
    today = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - timedelta(days=1))
        .not_valid_after(today + _LIFETIME)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(TLS_NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_atomically(run.tls_key, key_pem.decode())
    write_atomically(run.tls_certificate, certificate.public_bytes(serialization.Encoding.PEM).decode())
    write_atomically(run.token, secrets.token_urlsafe(32))
    return load(run)


def load(run: RunDir) -> Credentials:
    """Read the credentials of a run.

    Raises RegistryError when the directory or one of the files belongs to another user or lets others in.
    """
    check_private(run.path)
    check_private(run.credentials)
    return Credentials(
        key=_read(run.tls_key), certificate=_read(run.tls_certificate), token=_read(run.token).decode().strip()
    )


def _read(path: Path) -> bytes:
    check_private(path)
    return path.read_bytes()
