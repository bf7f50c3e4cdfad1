"""Deployments shared with a Unix group: what its members may read, and how they check who wrote it.

Sharing opens one folder per deployment below the owner's home, `shared/NAME`, of mode 0750: the registry entry, the
certificate, and the guests' key and token, with which one can generate and ask for the status, and nothing else.
"""

from __future__ import annotations

import grp
import itertools
import os
import shutil
import stat
from pathlib import Path

from mii_hpc.config import is_name
from mii_hpc.deployments import credentials
from mii_hpc.deployments.credentials import ClientCredentials
from mii_hpc.deployments.files import NewFile, open_to_group, read_bounded, write_together
from mii_hpc.deployments.registry import Entry
from mii_hpc.deployments.rundir import RunDir
from mii_hpc.errors import ConfigError, DeploymentNotFoundError, RegistryError

MOST_SHARES = 1000
"""No more shares of one home are looked at."""
_ENTRY, _CERTIFICATE, _IDENTITY, _TOKEN = "entry.json", "tls.crt", "client.pem", "token"


class Share:
    """One deployment's folder for a group. Belongs to the owner."""

    def __init__(self, home: Path, deployment_name: str, group: str) -> None:
        self._home = home
        self._folder = _shares_of(home) / deployment_name
        self._group = group

    def check(self) -> None:
        """Raise ConfigError unless the group exists and its members can reach the home directory."""
        group_id = self._group_id()
        if os.geteuid() != 0 and group_id not in (os.getegid(), *os.getgroups()):
            raise ConfigError(f"share='group:{self._group}': you are not a member of that group")
        for folder in self._home.parents:
            try:
                status = folder.stat()
            except FileNotFoundError:
                continue
            enters = stat.S_IXGRP if status.st_gid == group_id else stat.S_IXOTH
            if not status.st_mode & enters:
                raise ConfigError(
                    f"share='group:{self._group}': its members cannot enter {folder}; choose a `home` that they can "
                    f"reach, or: chmod o+x {folder}"
                )

    def create(self, run: RunDir) -> None:
        """Open the folder to the group, with the certificate, and the guests' key and token."""
        group_id = self._group_id()
        shares = _shares_of(self._home)
        shares.mkdir(mode=0o700, exist_ok=True)
        others = any(each.stat().st_gid != group_id for each in shares.iterdir())
        # Where another group passes through as well, everybody may: to names, which squeue shows too, and no further.
        open_to = [(self._home, 0o711), (shares, 0o755)] if others else [(self._home, 0o710), (shares, 0o750)]
        for folder, mode in (*open_to, (self._folder, 0o750)):
            open_to_group(folder, group_id, mode)
        identity, token = run.guest_identity.read_text(), run.guest_token.read_text()
        certificate = self._new(_CERTIFICATE, run.tls_certificate.read_text())
        write_together(certificate, *self.new_credentials(identity, token))

    def new_credentials(self, identity: str, token: str) -> tuple[NewFile, NewFile]:
        """Return the files that replace the guests' key, with its certificate, and their token."""
        return self._new(_IDENTITY, identity), self._new(_TOKEN, token)

    def publish(self, entry: Entry) -> None:
        """Replace the entry, with the model's folder by its real path: guests compare it, and do not look it up."""
        model = os.path.realpath(entry.model) if Path(entry.model).is_dir() else entry.model
        told = entry.for_guests().model_copy(update={"model": model})
        write_together(self._new(_ENTRY, told.model_dump_json(indent=2)))

    def _new(self, name: str, text: str) -> NewFile:
        # The folder's group, not the database's: that may be away for a while.
        return NewFile(self._folder / name, text, mode=0o640, group_id=self._folder.stat().st_gid)

    def _group_id(self) -> int:
        try:
            return grp.getgrnam(self._group).gr_gid
        except KeyError:
            raise ConfigError(f"share='group:{self._group}': there is no such group") from None


def withdraw(home: Path, deployment_name: str) -> None:
    """Close what is shared under a name; nothing happens when nothing is."""
    shutil.rmtree(_shares_of(home) / deployment_name, ignore_errors=True)


def names(home: Path) -> list[str]:
    """Return the names of the deployments below a home for which a share exists, with us or with others."""
    try:
        with os.scandir(_shares_of(home)) as folders:
            found = [folder.name for folder in itertools.islice(folders, MOST_SHARES)]
    except OSError:
        return []
    return sorted(name for name in found if is_name(name))


def certificate(home: Path, deployment_name: str) -> Path:
    """Return the file with the certificate of a deployment that is shared."""
    return _shares_of(home) / deployment_name / _CERTIFICATE


def read(home: Path, deployment_name: str) -> tuple[Entry, ClientCredentials]:
    """Return the entry and the guests' credentials of a deployment that another user shares.

    Raises DeploymentNotFoundError when there is none, or it is not shared with us; RegistryError when anybody but
    the owner of the home could have written what we would have to believe.
    """
    folder = _shares_of(home) / deployment_name
    try:
        owner = home.stat().st_uid
    except OSError as error:
        raise RegistryError(f"{home}: cannot be entered: {error.strerror}") from None
    if not is_name(deployment_name):
        raise _not_shared(home, deployment_name)
    try:
        for path in (home, _shares_of(home), folder):
            status = path.lstat()
            if status.st_uid != owner or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or stat.S_ISLNK(status.st_mode):
                raise RegistryError(
                    f"{path}: others than the owner of {home} could have written it; it is not believed"
                )
        entry, certificate, identity, token = (
            read_bounded(folder / name, owner=owner) for name in (_ENTRY, _CERTIFICATE, _IDENTITY, _TOKEN)
        )
    except OSError:
        raise _not_shared(home, deployment_name) from None
    told = Entry.parse(entry, folder / _ENTRY).for_guests()
    if told.deployment_name != deployment_name:
        raise RegistryError(f"{folder / _ENTRY}: is the entry of '{told.deployment_name}'; it is not believed")
    return told, credentials.of_guest(certificate, identity, token, folder)


def _not_shared(home: Path, deployment_name: str) -> DeploymentNotFoundError:
    message = f"{home} shares no deployment '{deployment_name}' with you"
    return DeploymentNotFoundError(message, deployment_name=deployment_name)


def _shares_of(home: Path) -> Path:
    return home / "shared"
