"""Which token may call which method of the balancer."""

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
    """The tokens of one deployment: the owner's, the guests' where it is shared, and that of its own ranks."""

    def __init__(self, run: RunDir, config: MIIConfig) -> None:
        self._run = run
        self._share = config.shared_group and Share(config.home, config.deployment_name, config.shared_group)
        self._rank = credentials.read_token(run.rank_token)
        self.read()

    def read(self) -> None:
        """Read the clients' tokens, which the run that had the name before may have rotated."""
        self._owner = credentials.read_token(self._run.owner_token)
        self._guest = credentials.read_token(self._run.guest_token)

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
        """Make new tokens for the owner and the guests, and write them to their files.

        The old ones are refused from now on; calls that were admitted go on. Raises OSError when the files cannot be
        written; all tokens stay what they were then.
        """
        owner, guest = credentials.new_token(), credentials.new_token()
        shared = [self._share.new_token_file(guest)] if self._share else []
        write_together(NewFile(self._run.owner_token, owner), NewFile(self._run.guest_token, guest), *shared)
        self._owner, self._guest = owner, guest
