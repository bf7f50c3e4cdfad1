"""What an engine is, and what it is started with. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from mii_hpc.config import LimitsConfig, ModelConfig
from mii_hpc.generation import Deliver, Description, GenerationRequest, Load, Prompt, Tokenization


@dataclass(frozen=True)
class EngineSpec:
    """The model that an engine serves, and its rank in a replica.

    Attributes:
        model: the model to serve, with `model_name_or_path` resolved to a folder where it is one.
        rank: this process's rank in the replica, from 0 to `world_size - 1`. Rank 0 leads.
        world_size: the replica's number of ranks; equal to `model.tensor_parallel`.
        local_rank: this rank's index among all ranks of the job on its host; picks the CUDA device.
        local_world_size: how many ranks of the job share this host, of whichever replica.
        replica_local_size: how many ranks of this replica are on this host; equal to `world_size`
            exactly when the replica does not span hosts.
        host: the address at which the other ranks of the replica reach this one; loopback
            when the replica does not span hosts.
        store_address: "host:port" of the replica's torch.distributed store; where the replica does not span hosts,
            the path of a file, which only this user can open.
        store_fd: on rank 0, the listening socket or the file behind `store_address`; None on the others.
        limits: what each role may have in hand.
    """

    model: ModelConfig
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    replica_local_size: int
    host: str
    store_address: str
    store_fd: int | None = None
    limits: LimitsConfig = field(default_factory=LimitsConfig)

    @classmethod
    def alone(cls, model: ModelConfig) -> Self:
        """Return the spec of a rank that is a whole replica, alone on its host."""
        return cls(
            model,
            rank=0,
            world_size=1,
            local_rank=0,
            local_world_size=1,
            replica_local_size=1,
            host="127.0.0.1",
            store_address="",
        )


class Codec(Protocol):
    """From prompts to token ids, and back. May be used beside the engine, by one thread at a time."""

    def tokenize(self, prompt: Prompt, plain: bool = False) -> Tokenization:
        """Return a prompt as the model sees it; `plain` is without the special tokens that it begins or ends with.

        Raises InvalidRequestError when it is no prompt for this model.
        """

    def describe(self) -> Description:
        """Return what is served."""


class Engine(Protocol):
    """One rank of a replica's engine.

    The process calls `load`, then `run` on a thread of its own. On rank 0, `submit`, `cancel`, `stats`
    and `close` may be called from any thread once `load` has returned.
    """

    def load(self, progress: Callable[[str], None]) -> None:
        """Load this rank's shard of the model and meet the replica's other ranks. `run` follows on the same thread.

        OpenMP keeps threads for each thread that computes, and lets them all sleep early once they are more than
        the cores: a model loaded on another thread generates at two thirds of the speed.

        Calls `progress` with a short sentence now and then. Raises ConfigError when the model cannot
        be served, by name and reason.
        """

    def run(self) -> None:
        """Generate until `close` is called on rank 0; then return on every rank.

        Raises the error that keeps the engine from going on. An error of a single request is not raised.
        """

    def submit(self, request: GenerationRequest, deliver: Deliver) -> None:
        """Queue a request and return without waiting for it.

        Raises QueueFullError at once when too many requests wait. Whatever is wrong with the request
        itself reaches `deliver` as an InvalidRequestError.
        """

    def cancel(self, request_id: str) -> None:
        """Forget a request and free its KV cache within a step. Its `deliver` is not called again.

        Unknown and finished ids are ignored.
        """

    @property
    def context(self) -> int | None:
        """The bound on prompt plus answer, in tokens; None without one. Known once `load` has returned."""

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, as transformers has it; None where there is none. Known once `load` has returned."""

    @property
    def steps(self) -> int:
        """How many steps it has made; grows while requests run."""

    def stats(self) -> Load:
        """Return the load at this moment."""

    def close(self) -> None:
        """Make `run` return on every rank of the replica. Unfinished requests are dropped."""
