"""Who may connect to the balancer, and which token may call which method."""

from __future__ import annotations

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


class Access:
    """The keys of one deployment: the owner's, the guests' where it is shared, and those of its own ranks.

    Attributes:
        certificates: those with which one may connect, all in one (PEM).
    """

    def __init__(self, run: RunDir, config: MIIConfig) -> None:
        self._run = run
        self._share = config.shared_group and Share(config.home, config.deployment_name, config.shared_group)
        self._rank = credentials.read_token(run.rank_token)
        self._rank_certificate = credentials.load_server(run).certificate
        owner, guest = (credentials.read_identity(path) for path in (run.owner_identity, run.guest_identity))
        self.certificates = self._certificates(owner, guest)
        self._owner = credentials.read_token(run.owner_token)
        self._guest = credentials.read_token(run.guest_token)

    def admits(self, method: str, token: str) -> bool:
        """Whether a token may call a method. Takes the same time for every token."""
        rank, owner, guest = (transport.same_token(token, own) for own in (self._rank, self._owner, self._guest))
        return (
            (rank and method in RANK_METHODS)
            or (owner and method in OWNER_METHODS)
            or (guest and bool(self._share) and method in GUEST_METHODS)
        )

    def is_guest(self, token: str) -> bool:
        """Whether it is the guests' token."""
        return transport.same_token(token, self._guest)

    def rotate(self) -> None:
        """Make new tokens and certificates for the owner and the guests, and write them to their files.

        The old ones are refused from now on; calls that were admitted go on, and so do connections. Raises OSError when
        the files cannot be written; all stay what they were then.
        """
        run = self._run
        owner, guest = credentials.new_token(), credentials.new_token()
        owner_identity, guest_identity = credentials.new_identity(), credentials.new_identity()
        write_together(
            NewFile(run.owner_token, owner),
            NewFile(run.owner_identity, owner_identity),
            NewFile(run.guest_token, guest),
            NewFile(run.guest_identity, guest_identity),
            *(self._share.new_credentials(guest_identity, guest) if self._share else ()),
        )
        self.certificates = self._certificates(owner_identity.encode(), guest_identity.encode())
        self._owner, self._guest = owner, guest

    def _certificates(self, owner: bytes, guest: bytes) -> bytes:
        clients = (owner, guest) if self._share else (owner,)
        return self._rank_certificate + b"".join(map(credentials.certificate_of, clients))
