"""Finding a deployment by its name or its model's, in the user's own home or in one that another user shares."""

from __future__ import annotations

import contextlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mii_hpc.config import MIIConfig, ModelConfig, plain_name
from mii_hpc.deployments import credentials, sharing
from mii_hpc.deployments.credentials import ClientCredentials
from mii_hpc.deployments.registry import Entry, Registry, heartbeat_is_fresh
from mii_hpc.deployments.rundir import RunDir
from mii_hpc.deployments.sharing import Share
from mii_hpc.errors import DeploymentNotFoundError, RegistryError

log = logging.getLogger(__name__)

DEEPSPEED_MIIS_SUFFIX = "-mii-deployment"
"""What DeepSpeed-MII makes a deployment's name with, after the model's."""


@dataclass(frozen=True)
class Found:
    """A deployment that was found: its home, its registry entry, and the credentials of its clients."""

    home: Home
    entry: Entry
    credentials: ClientCredentials

    @property
    def config(self) -> MIIConfig:
        """The deployment's own configuration, with the port that it has; of one that is shared, as far as is known."""
        port = self.entry.address.rpartition(":")[2]
        return self.home.config_of(self.entry).model_copy(
            update={"home": self.home.path, "port_number": int(port) if port else 0}
        )


class Home(ABC):
    """A home directory in which deployments are looked for.

    Attributes:
        path: the directory.
        is_own: whether its deployments and their jobs are this user's own.

    Every method may raise RegistryError when what is there cannot be trusted.
    """

    is_own: ClassVar[bool]

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def entries(self) -> list[Entry]:
        """Return the entries of all deployments, by name."""

    def get(self, deployment_name: str) -> Found:
        """Return the deployment of that name. Raises DeploymentNotFoundError when there is none."""
        entry, keys = self._read(deployment_name)
        if keys.fingerprint != entry.fingerprint:
            raise RegistryError(f"deployment '{deployment_name}': its certificate is not the one in the registry")
        return Found(self, entry, keys)

    @abstractmethod
    def certificate(self, entry: Entry) -> Path:
        """Return the file with the certificate of a deployment that is there."""

    def find(self, model_or_deployment_name: str, is_live: Callable[[Entry], bool] = lambda entry: True) -> Found:
        """Return the deployment of that name, or else the one that serves that model.

        The name may be written as it was to serve(), or with DeepSpeed-MII's "-mii-deployment" at its end. A model is
        named as it was to serve(), or by any path to the same folder. Raises DeploymentNotFoundError when there is
        none, or more than one deployment of that model for which `is_live` holds.
        """
        name, entries = model_or_deployment_name, self.entries()
        model = name.removesuffix(DEEPSPEED_MIIS_SUFFIX)
        folder = os.path.realpath(model)
        serving = [e.deployment_name for e in entries if model == e.model or folder == self._folder_of(e)]
        if len(serving) > 1:
            by_name = {entry.deployment_name: entry for entry in entries}
            serving = [name for name in serving if is_live(by_name[name])] or serving
        only = serving if len(serving) == 1 else []
        for written in (name, *only, plain_name(name), plain_name(model)):
            if any(entry.deployment_name == written for entry in entries):
                return self.get(written)
        if serving:
            names = ", ".join(f"'{each}'" for each in serving)
            raise DeploymentNotFoundError(f"'{name}' is served by several deployments; name one of them: {names}")
        there = ", ".join(f"'{e.deployment_name}' ({e.model})" for e in entries) or "none"
        raise DeploymentNotFoundError(
            f"no deployment has the name or the model '{name}' in {self.path}; there: {there}"
        )

    @abstractmethod
    def config_of(self, entry: Entry) -> MIIConfig:
        """Return the configuration of a deployment, as far as it can be read here."""

    @abstractmethod
    def _folder_of(self, entry: Entry) -> str:
        """Return the real path of a deployment's model, where it is a folder."""

    @abstractmethod
    def _read(self, deployment_name: str) -> tuple[Entry, ClientCredentials]:
        """Return what is written of the deployment of that name."""


class OwnHome(Home):
    """The user's own home."""

    is_own = True

    def entries(self) -> list[Entry]:
        """See Home.entries()."""
        return Registry(self.path).entries()

    def config_of(self, entry: Entry) -> MIIConfig:
        """See Home.config_of()."""
        return RunDir(entry.run_dir).load_config()

    def _folder_of(self, entry: Entry) -> str:
        return os.path.realpath(entry.model)

    def certificate(self, entry: Entry) -> Path:
        """See Home.certificate()."""
        return RunDir(entry.run_dir).tls_certificate

    def _read(self, deployment_name: str) -> tuple[Entry, ClientCredentials]:
        registry = Registry(self.path)
        entry = registry.get(deployment_name)
        if entry is None:
            raise DeploymentNotFoundError(
                f"deployment '{deployment_name}' is not in the registry {registry.folder}",
                deployment_name=deployment_name,
            )
        return entry, credentials.load_owner(RunDir(entry.run_dir))


class SharedHome(Home):
    """The home of another user who shares deployments with this one, and whom this one trusts."""

    is_own = False

    def entries(self) -> list[Entry]:
        """See Home.entries()."""
        found = []
        for name in sharing.names(self.path):
            with contextlib.suppress(DeploymentNotFoundError):  # not shared with this user, or not serving yet
                try:
                    found.append(self._read(name)[0])
                except RegistryError as error:
                    log.warning("%s", error)
        return found

    def config_of(self, entry: Entry) -> MIIConfig:
        """Return what the entry says: the run directory is not for guests."""
        return MIIConfig(
            deployment_name=entry.deployment_name,
            cluster=entry.cluster,
            model_conf=ModelConfig(
                model_name_or_path=entry.model, tensor_parallel=entry.tensor_parallel, replica_num=entry.replica_num
            ),
        )

    def _folder_of(self, entry: Entry) -> str:
        return entry.model  # as its owner's job has seen it; what others write is looked up nowhere

    def certificate(self, entry: Entry) -> Path:
        """See Home.certificate()."""
        return sharing.certificate(self.path, entry.deployment_name)

    def _read(self, deployment_name: str) -> tuple[Entry, ClientCredentials]:
        return sharing.read(self.path, deployment_name)


def find(
    model_or_deployment_name: str, homes: Iterable[Home], is_live: Callable[[Entry], bool] = lambda entry: True
) -> Found:
    """Return the deployment of that name or model in the first of the homes that has one.

    Raises DeploymentNotFoundError, with what each home says, when none has; RegistryError when a home that was
    looked into cannot be trusted.
    """
    missed = []
    for home in homes:
        try:
            # A cluster may hide the jobs of other users.
            return home.find(model_or_deployment_name, is_live if home.is_own else heartbeat_is_fresh)
        except DeploymentNotFoundError as error:
            missed.append(str(error))
    raise DeploymentNotFoundError("; ".join(missed))


def take_name(config: MIIConfig, run: RunDir, entry: Entry, is_live: Callable[[Entry], bool]) -> None:
    """Claim the name of a run, and share it with the group that its configuration names.

    Raises DeploymentExistsError when a deployment for which `is_live` holds has the name.
    """
    Registry(config.home).claim(entry, is_live)
    try:
        sharing.withdraw(config.home, config.deployment_name)  # what a killed run has left
        if config.shared_group is not None:
            Share(config.home, config.deployment_name, config.shared_group).create(run)
    except BaseException:
        free_name(config.home, entry)
        raise


def runs_in_use(home: Path) -> set[Path]:
    """Return the directories of the runs that have a name, and of those that are to take it next."""
    named = {entry.run_dir for entry in Registry(home).entries()}
    successors = (RunDir(path).read_successor() for path in named)
    return named | {successor.path for successor in successors if successor is not None}


def free_name(home: Path, entry: Entry) -> None:
    """Withdraw the entry of a run, and what it shares. Nothing happens when the name is no longer the run's."""
    registry = Registry(home)
    holder = registry.get(entry.deployment_name)
    if holder is None or holder.run_dir != entry.run_dir:
        return
    sharing.withdraw(home, entry.deployment_name)  # first, while nobody else can take the name and share it anew
    registry.withdraw(entry)
