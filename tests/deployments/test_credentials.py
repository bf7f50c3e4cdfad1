import hashlib
import ssl

import pytest

from mii_hpc.config import resolve
from mii_hpc.deployments import credentials
from mii_hpc.deployments.rundir import RunDir
from mii_hpc.errors import RegistryError

TOKENS = ("owner-token", "guest-token", "rank-token")


@pytest.fixture
def run(tmp_path):
    return RunDir.create(resolve("m", home=tmp_path / "home"))


def test_they_are_private_files(run):
    credentials.create(run)
    assert run.credentials.stat().st_mode & 0o777 == 0o700
    files = {path.name: path.stat().st_mode & 0o777 for path in run.credentials.iterdir()}
    assert files == dict.fromkeys(("tls.key", "tls.crt", "owner.pem", "guest.pem", *TOKENS), 0o600)


def test_loading_gives_what_was_created(run):
    keys = credentials.create(run)
    assert credentials.load_owner(run) == keys
    ranks = credentials.load_server(run)
    assert ranks.certificate == keys.certificate and ranks.as_client.identity == ranks.key + ranks.certificate
    assert credentials.certificate_of(ranks.as_client.identity) == ranks.certificate


def test_every_door_has_its_own_token(run):
    credentials.create(run)
    assert len({credentials.read_token(run.credentials / name) for name in TOKENS}) == len(TOKENS)


def test_every_run_has_its_own(run, tmp_path):
    one = credentials.create(run)
    other = credentials.create(RunDir.create(resolve("m", home=tmp_path / "home")))
    assert len({one.token, other.token, one.fingerprint, other.fingerprint, one.identity, other.identity}) == 6
    assert len(one.token) >= 32


@pytest.mark.parametrize("which", ["path", "credentials", "tls_key", "tls_certificate", "rank_token"])
def test_what_others_can_read_is_not_used(run, which):
    credentials.create(run)
    path = getattr(run, which)
    path.chmod(path.stat().st_mode | 0o040)
    with pytest.raises(RegistryError, match=rf"^{path}: mode 0\d40 gives others access; correct it with: chmod"):
        credentials.load_server(run)


def test_secrets_are_not_shown(run):
    keys = credentials.create(run)
    assert repr(keys) == str(keys) == "ClientCredentials()"
    assert repr(credentials.load_server(run)) == "ServerCredentials()"
    assert keys.token not in f"{vars(run)}"


def test_the_fingerprint_is_the_certificates(run):
    keys = credentials.create(run)
    der = ssl.PEM_cert_to_DER_cert(keys.certificate.decode())
    assert keys.fingerprint == hashlib.sha256(der).hexdigest()
