"""The secrets of one deployment: TLS keys and certificates, and its tokens.

They are files of mode 0600 in the run directory and nowhere else: not in argv, environment, pickles or logs.
Three tokens allow different methods: the owner's all methods of a client; the guests' those that a Unix group may
call where the deployment is shared; the ranks' those between the processes of the job. Each of the three shows a
certificate of its own besides, without which no connection comes about; the ranks' is the deployment's.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import secrets
import ssl
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from mii_hpc.deployments.files import NewFile, check_private, write_atomically, write_together
from mii_hpc.deployments.rundir import RunDir
from mii_hpc.errors import RegistryError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

TLS_NAME = "mii-hpc"
"""The name in every certificate. Clients pin the certificate itself, so hosts and addresses may change."""

_LIFETIME = timedelta(days=3650)  # the certificate dies with its deployment; only clock skew must not matter

_IDENTITY = re.compile(
    b"".join(
        b"-----BEGIN %b-----\n[A-Za-z0-9+/=\n]{1,8192}-----END %b-----\n" % (kind, kind)
        for kind in (b"PRIVATE KEY", b"CERTIFICATE")
    )
)


@dataclass(frozen=True)
class ClientCredentials:
    """What a client needs. Never shown by repr().

    Attributes:
        certificate: the server's, to believe (PEM).
        identity: its own key, and the certificate to show (PEM).
        token: what to show on every call.
    """

    certificate: bytes = field(repr=False)
    identity: bytes = field(repr=False)
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
        return ClientCredentials(self.certificate, self.key + self.certificate, self.rank_token)


def create(run: RunDir) -> ClientCredentials:
    """Make new credentials for a run, write them to its directory, and return the owner's."""
    key, certificate = self_signed(TLS_NAME, is_authority=True)
    write_atomically(run.tls_key, key)
    write_atomically(run.tls_certificate, certificate)
    write_atomically(run.owner_identity, new_identity())
    write_atomically(run.guest_identity, new_identity())
    for token in (run.rank_token, run.owner_token, run.guest_token):
        write_atomically(token, new_token())
    return load_owner(run)


def create_for_gateway(run: RunDir, hosts: Iterable[str]) -> None:
    """Make key and certificate for HTTPS at the given names and IP addresses, and write them to the run's directory.

    Who believes the deployment's certificate believes this one, too.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    authority = load_pem_private_key(_read(run.tls_key), None)
    assert isinstance(authority, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    names: list[x509.GeneralName] = []
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    certificate = _certificate(_name(f"{TLS_NAME} gateway"), _name(TLS_NAME), key.public_key(), authority, names)
    write_atomically(run.gateway_key, _pem(key))
    write_atomically(run.gateway_certificate, _pem(certificate))


def self_signed(common: str, is_authority: bool) -> tuple[str, str]:
    """Return a new key, and its certificate for one name."""
    # Imported here, because only who submits a deployment needs it.
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), _name(common)
    certificate = _certificate(name, name, key.public_key(), key, [x509.DNSName(common)], is_authority)
    return _pem(key), _pem(certificate)


def _name(common: str) -> x509.Name:
    from cryptography import x509

    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common)])


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    authority: ec.EllipticCurvePrivateKey,
    names: Sequence[x509.GeneralName],
    is_authority: bool = False,
) -> x509.Certificate:
    """Return a certificate that strict verifiers take (RFC 5280, section 4.2)."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    today = datetime.now(UTC)
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"), False
    )
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - timedelta(days=1))
        .not_valid_after(today + _LIFETIME)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=0 if is_authority else None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=True,
                key_cert_sign=is_authority,
                crl_sign=False,
                decipher_only=False,
                **usage,
            ),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
        .sign(authority, hashes.SHA256())
    )


def _pem(item: ec.EllipticCurvePrivateKey | x509.Certificate) -> str:
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    if isinstance(item, x509.Certificate):
        return item.public_bytes(serialization.Encoding.PEM).decode()
    encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    return item.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain).decode()


def new_token() -> str:
    """Return a random token of 256 bits."""
    return secrets.token_urlsafe(32)


def hand_on(run: RunDir, successor: RunDir) -> bool:
    """Give a run's successor the credentials that its clients have now. Returns whether it had others."""
    now, then = ([_read(path) for path in each.of_clients] for each in (run, successor))
    if now == then:
        return False
    write_together(*(NewFile(path, text.decode()) for path, text in zip(successor.of_clients, now, strict=True)))
    return True


def new_identity() -> str:
    """Return a new key with a certificate that clients show. Its name is its own, by which a server looks it up."""
    return "".join(self_signed(f"{TLS_NAME} client {secrets.token_hex(8)}", is_authority=False))


def certificate_of(identity: bytes) -> bytes:
    """Return the certificate of an identity, without the key."""
    return identity[identity.index(b"-----BEGIN CERTIFICATE") :]


def load_owner(run: RunDir) -> ClientCredentials:
    """Read what the owner's clients need.

    Raises RegistryError when the directory or one of the files belongs to another user or gives others access.
    """
    _check(run)
    return ClientCredentials(_read(run.tls_certificate), read_identity(run.owner_identity), read_token(run.owner_token))


def load_server(run: RunDir) -> ServerCredentials:
    """Read what the job's processes need. Raises RegistryError as load_owner() does."""
    _check(run)
    return ServerCredentials(_read(run.tls_certificate), _read(run.tls_key), read_token(run.rank_token))


def read_token(path: Path) -> str:
    """Read one token. Raises RegistryError when its file belongs to another user or gives others access."""
    return _read(path).decode().strip()


def read_identity(path: Path) -> bytes:
    """Read a key with its certificate. Raises RegistryError when others have access to the file, or it is none."""
    return _identity(_read(path), path)


def of_guest(certificate: bytes, identity: bytes, token: bytes, folder: Path) -> ClientCredentials:
    """Return what another user shares in a folder. Raises RegistryError when one of it is not what it should be."""
    shown = token.strip()
    if not re.fullmatch(rb"[A-Za-z0-9_-]{1,256}", shown):
        raise RegistryError(f"{folder}: what it holds as a token is none")
    keys = ClientCredentials(certificate, _identity(identity, folder), shown.decode())
    try:
        assert keys.fingerprint
    except ValueError:
        raise RegistryError(f"{folder}: what it holds as a certificate is none") from None
    return keys


def _identity(text: bytes, path: Path) -> bytes:
    if not _IDENTITY.fullmatch(text):
        raise RegistryError(f"{path}: what it holds as a client's key and certificate is none")
    return text


def _check(run: RunDir) -> None:
    check_private(run.path)
    check_private(run.credentials)


def _read(path: Path) -> bytes:
    check_private(path)
    return path.read_bytes()
