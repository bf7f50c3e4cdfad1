"""The secrets of one deployment: TLS key and certificate, and its tokens.

They are files of mode 0600 in the run directory and nowhere else: not in argv, environment, pickles or logs.
Three tokens allow different methods: the owner's all methods of a client; the guests' those that a Unix group may
call where the deployment is shared; the ranks' those between the processes of the job.
"""

from __future__ import annotations

import hashlib
import secrets
import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from mii_hpc.deployments.files import check_private, write_atomically
from mii_hpc.deployments.rundir import RunDir

TLS_NAME = "mii-hpc"
"""The name in every certificate. Clients pin the certificate itself, so hosts and addresses may change."""

_LIFETIME = timedelta(days=3650)  # the certificate dies with its deployment; only clock skew must not matter


@dataclass(frozen=True)
class ClientCredentials:
    """What a client needs: the certificate to believe (PEM), and the token to show. Never shown by repr()."""

    certificate: bytes = field(repr=False)
    token: str = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate, in hexadecimal."""
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(self.certificate.decode())).hexdigest()


@dataclass(frozen=True)
class ServerCredentials:
    """What the job's processes need: the key (PEM) with its certificate, and the ranks' own token."""

    certificate: bytes = field(repr=False)
    key: bytes = field(repr=False)
    rank_token: str = field(repr=False)

    @property
    def as_client(self) -> ClientCredentials:
        """What one of the job's processes shows to another."""
        return ClientCredentials(self.certificate, self.rank_token)


def create(run: RunDir) -> ClientCredentials:
    """Make new credentials for a run, write them to its directory, and return the owner's."""
    # Imported here, because only who submits a deployment needs it.
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
    write_atomically(run.rank_token, new_token())
    write_atomically(run.owner_token, new_token())
    write_atomically(run.guest_token, new_token())
    return load_owner(run)


def new_token() -> str:
    """Return a random token of 256 bits."""
    return secrets.token_urlsafe(32)


def load_owner(run: RunDir) -> ClientCredentials:
    """Read what the owner's clients need.

    Raises RegistryError when the directory or one of the files belongs to another user or gives others access.
    """
    _check(run)
    return ClientCredentials(_read(run.tls_certificate), read_token(run.owner_token))


def load_server(run: RunDir) -> ServerCredentials:
    """Read what the job's processes need. Raises RegistryError as load_owner() does."""
    _check(run)
    return ServerCredentials(_read(run.tls_certificate), _read(run.tls_key), read_token(run.rank_token))


def read_token(path: Path) -> str:
    """Read one token. Raises RegistryError when its file belongs to another user or gives others access."""
    return _read(path).decode().strip()


def _check(run: RunDir) -> None:
    check_private(run.path)
    check_private(run.credentials)


def _read(path: Path) -> bytes:
    check_private(path)
    return path.read_bytes()
