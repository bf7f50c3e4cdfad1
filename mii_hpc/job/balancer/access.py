"""Who may connect to the balancer, and which token may call which method."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from mii_hpc.config import MIIConfig
from mii_hpc.deployments import credentials
from mii_hpc.deployments.files import NewFile, write_together
from mii_hpc.deployments.rundir import RunDir
from mii_hpc.deployments.sharing import Share
from mii_hpc.rpc import transport
from mii_hpc.rpc.wire import Method

GUEST_METHODS = frozenset({Method.GENERATE, Method.TOKENIZE, Method.DESCRIBE, Method.STATUS})
OWNER_METHODS = GUEST_METHODS | {Method.TERMINATE, Method.ROTATE_TOKEN}
RANK_METHODS = frozenset({Method.JOIN})


@dataclass(frozen=True)
class _Keys:
    """The token of a client, and its key with the certificate (PEM)."""

    token: str
    identity: str

    @classmethod
    def new(cls) -> _Keys:
        return cls(credentials.new_token(), credentials.new_identity())

    @property
    def certificate(self) -> bytes:
        return credentials.certificate_of(self.identity.encode())


class Access:
    """The keys of one deployment: the owner's, the guests' where it is shared, and those of its own ranks.

    Attributes:
        certificates: those with which one may connect, all in one (PEM).
    """

    def __init__(self, run: RunDir, config: MIIConfig) -> None:
        self._run = run
        self._share = config.shared_group and Share(config.home, config.deployment_name, config.shared_group)
        self._ranks = credentials.load_server(run).as_client
        self._rotating = threading.Lock()
        self.read()

    def read(self) -> None:
        """Read the clients' keys from their files, which the run that had the name before may have rotated."""
        with self._rotating:
            run = self._run
            owner, guest = (
                _Keys(credentials.read_token(token), credentials.read_identity(identity).decode())
                for token, identity in ((run.owner_token, run.owner_identity), (run.guest_token, run.guest_identity))
            )
            self._admit((owner,), (guest,))

    def admits(self, method: str, token: str) -> bool:
        """Whether a token may call a method. Takes the same time for every token that opens nothing."""
        rank, owner = transport.same_token(token, self._ranks.token), _any_has(token, self._owners)
        return (
            (rank and method in RANK_METHODS)
            or (owner and method in OWNER_METHODS)
            or (self.is_guest(token) and bool(self._share) and method in GUEST_METHODS)
        )

    def is_guest(self, token: str) -> bool:
        """Whether it is the guests' token."""
        return _any_has(token, self._guests)

    def rotate(self) -> None:
        """Make new tokens and certificates for the owner and the guests, and write them to their files.

        The old ones are refused from now on; calls that were admitted go on, and so do connections. Raises OSError when
        the files cannot be written; all stay what they were then.
        """
        with self._rotating:
            run, before = self._run, (self._owners, self._guests)
            owner, guest = _Keys.new(), _Keys.new()
            self._admit((*self._owners, owner), (*self._guests, guest))  # whoever reads them at once is let in
            try:
                write_together(
                    NewFile(run.owner_token, owner.token),
                    NewFile(run.owner_identity, owner.identity),
                    NewFile(run.guest_token, guest.token),
                    NewFile(run.guest_identity, guest.identity),
                    *(self._share.new_credentials(guest.identity, guest.token) if self._share else ()),
                )
            except BaseException:
                self._admit(*before)
                raise
            self._admit((owner,), (guest,))

    def _admit(self, owners: tuple[_Keys, ...], guests: tuple[_Keys, ...]) -> None:
        self._owners, self._guests = owners, guests
        clients = (*owners, *guests) if self._share else owners
        self.certificates = self._ranks.certificate + b"".join(keys.certificate for keys in clients)


def _any_has(token: str, keys: tuple[_Keys, ...]) -> bool:
    return any(transport.same_token(token, each.token) for each in keys)
