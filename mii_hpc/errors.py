"""Every error that mii_hpc raises on purpose.

    MIIError
    ├── ConfigError (ValueError)          a configuration is wrong; raised before anything is submitted
    │   └── UnknownArgument               a keyword or field of that name does not exist
    ├── RegistryError                     the registry folder cannot be used or trusted
    ├── SubmissionError                   Slurm refused the job; the message is Slurm's own
    ├── DeploymentError
    │   ├── DeploymentNotFoundError       no live deployment of that name
    │   ├── DeploymentExistsError         the name is taken by a live deployment
    │   ├── DeploymentFailedError         the job died, or could not start; has the end of its log
    │   └── DeploymentTimeoutError        a deadline for queueing or starting has passed
    └── RequestError
        ├── InvalidRequestError (ValueError)   the request itself is wrong; repeating it is useless
        ├── QueueFullError                     too many requests are waiting; try again later
        ├── ReplicaLostError                   the replica died with the request, which could not move to another
        ├── DeploymentStoppingError            the deployment no longer admits requests
        ├── UnavailableError                   no replica can serve now, or the balancer does not answer
        ├── AuthenticationError                the token is missing, wrong, or lacks the right
        ├── RequestTimeoutError (TimeoutError) the caller's timeout has passed
        └── RequestCancelledError              the request was cancelled

`retryable` says whether the same call may succeed later without a change. `facts` names the attributes that tell,
beside the message, what an error is about; they are the same on the client as where it was raised.
This module imports nothing, so that every other one can import it.
"""


class MIIError(Exception):
    """Base of all errors of this package."""

    retryable = False
    responses: "list[object]" = []  # noqa: RUF012 (replaced, never changed)
    """When one call had several prompts, what came of each of them, in order: a list of answers, or the error."""
    facts: "tuple[str, ...]" = ()
    """The names of the attributes that tell what the error is about. Each is also a keyword of the class."""


class ConfigError(MIIError, ValueError):
    """A configuration value is wrong. The message names the field, the value, and what is allowed."""


class UnknownArgument(ConfigError):
    """There is no keyword or field of that name; the message names the closest ones."""


class RegistryError(MIIError):
    """The registry or a run directory cannot be used: wrong owner, wrong mode, or unreadable content."""


class SubmissionError(MIIError):
    """The job could not be submitted. The message is the scheduler's."""


class DeploymentError(MIIError):
    """Base of the errors about one deployment.

    Attributes:
        deployment_name: its name; "" where it is not known.
    """

    facts: "tuple[str, ...]" = ("deployment_name",)

    def __init__(self, message: str = "", *, deployment_name: str = "") -> None:
        super().__init__(message)
        self.deployment_name = deployment_name


class DeploymentNotFoundError(DeploymentError):
    """No live deployment has that name or serves that model."""


class DeploymentExistsError(DeploymentError):
    """The deployment name is taken by a live deployment."""


class DeploymentFailedError(DeploymentError):
    """The job of a deployment died.

    Attributes:
        deployment_name: its name.
        job_id: the scheduler's id of the job.
        state: the state that the scheduler or the ranks reported, such as "FAILED" or "OUT_OF_MEMORY".
        log: the end of the failing rank's log, with its traceback when there was one.
    """

    facts = ("deployment_name", "job_id", "state", "log")

    def __init__(
        self, message: str = "", *, deployment_name: str = "", job_id: str = "", state: str = "", log: str = ""
    ) -> None:
        super().__init__(message, deployment_name=deployment_name)
        self.job_id = job_id
        self.state = state
        self.log = log

    def __str__(self) -> str:
        return f"{self.args[0]}\n{self.log}" if self.log else str(self.args[0])


class DeploymentTimeoutError(DeploymentError):
    """The deployment did not leave the queue, or did not become ready, within the time given."""


class RequestError(MIIError):
    """Base of the errors about one request.

    Attributes:
        deployment_name: the deployment that was asked; "" where none was, as in a pipeline.
        replica: the index of the replica that worked on the request, or would have; None where it came to none.
        host: the node of that replica's leader; "" where it came to none.
    """

    facts: "tuple[str, ...]" = ("deployment_name", "replica", "host")

    def __init__(
        self, message: str = "", *, deployment_name: str = "", replica: "int | None" = None, host: str = ""
    ) -> None:
        super().__init__(message)
        self.deployment_name = deployment_name
        self.replica = replica
        self.host = host


class InvalidRequestError(RequestError, ValueError):
    """The request cannot be served as it is. Other requests are not affected."""


class QueueFullError(RequestError):
    """The replica's queue is at its bound; the message says its length."""

    retryable = True


class ReplicaLostError(RequestError):
    """The replica died while it worked on the request, which could not go on at another; the message says why not.

    `deployment_name`, `replica` and `host` say which replica it was.
    """

    retryable = True


class DeploymentStoppingError(RequestError):
    """The deployment is ending and admits no more requests.

    Attributes:
        comes_back: whether its name will be served again without anybody's help, or is already, by another job.
    """

    facts = ("deployment_name", "replica", "host", "comes_back")

    def __init__(
        self,
        message: str = "",
        *,
        deployment_name: str = "",
        replica: "int | None" = None,
        host: str = "",
        comes_back: bool = False,
    ) -> None:
        super().__init__(message, deployment_name=deployment_name, replica=replica, host=host)
        self.comes_back = comes_back


class UnavailableError(RequestError):
    """No replica is able to serve at the moment, or the balancer cannot be reached."""

    retryable = True


class AuthenticationError(RequestError):
    """The deployment did not accept the token for this call."""


class RequestTimeoutError(RequestError, TimeoutError):
    """The caller's timeout passed before the answer was complete."""


class RequestCancelledError(RequestError):
    """The request was cancelled before its answer was complete."""
