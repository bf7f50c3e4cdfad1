"""What a user can configure: frozen pydantic models, validated once, on the login node.

A wrong value raises `ConfigError` with one sentence that names the field, the value and what is allowed.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import from_json

from mii_hpc.constants import TaskType
from mii_hpc.errors import ConfigError, InvalidRequestError, UnknownArgument
from mii_hpc.gres import gpus_in
from mii_hpc.printable import one_line, printable, shown
from mii_hpc.reading import read_bounded

NAME_LENGTH = 100
STOP_CHARACTERS = 2**16
"""All stop strings of all answers to a request have no more than these."""
GRAMMAR_BYTES = 2**16
"""What a request says of the grammar of its answers is no longer, as JSON."""
YAML_BYTES = 2**16
"""No YAML file is longer: PyYAML reads some 100 KiB a second."""
YAML_NODES = 10_000
"""Nor holds more than this, with its aliases written out."""
MOST_SENTENCES = 10
"""No more mistakes are told at once."""
"""Characters in a deployment's name, at most."""

SUPERSEDED_MODEL_FIELDS: dict[str, str] = {
    "device_map": "Slurm places the ranks; use slurm.gpus_per_node and slurm.tasks_per_node",
    "profile_model_time": "the engine logs its own step times",
    "replica_configs": "Slurm places the replicas; use slurm.tasks_per_node and slurm.nodelist",
    "sync_debug": "set log level DEBUG instead",
    "torch_dist_port": "every replica takes a free port",
    "zmq_port_number": "the ranks of a replica talk over torch.distributed",
}
SUPERSEDED_MII_FIELDS: dict[str, str] = {
    "deployment_type": "a deployment is always a persistent one; use pipeline() for the other kind",
    "hf_auth_token": "set HF_TOKEN in the environment; no secret is stored in a configuration",
    "hostfile": "Slurm chooses the hosts; use slurm.nodelist or slurm.constraint",
    "instance_type": "Slurm chooses the machines; use slurm.partition and slurm.constraint",
    "restful_api_host": "the gateway answers on the node of the job's first rank",
    "restful_processes": "one process answers all requests",
    "version": "deployments are not versioned; use another deployment_name",
}
"""Fields of DeepSpeed-MII that are accepted with a warning, and what happens instead."""
SILENT: dict[str, Any] = {
    "deployment_type": "local",
    "device_map": "auto",
    "hostfile": "/job/hostfile",
    "instance_type": "Standard_NC12s_v3",
    "profile_model_time": False,
    "replica_configs": [],
    "restful_api_host": "localhost",
    "restful_processes": 32,
    "sync_debug": False,
    "torch_dist_port": 29500,
    "version": 1,
    "zmq_port_number": 25555,
}
"""DeepSpeed-MII's defaults of these. Who gives them asks for nothing, and needs no warning."""
RENAMED_MII_FIELDS: dict[str, str] = {"enable_restful_api": "gateway", "restful_api_port": "gateway_port"}
"""Fields of DeepSpeed-MII that have another name here."""
STATE_MANAGER: dict[str, str] = {
    "max_ragged_batch_size": "max_batch_tokens",
    "max_ragged_sequence_count": "max_batch_size",
}
"""Fields of DeepSpeed's `inference_engine_config.state_manager`, and those of EngineConfig that mean the same."""
SUPERSEDED_ENGINE_FIELDS: dict[str, str] = {
    "max_context": "`max_length` bounds a sequence",
    "max_tracked_sequences": "`queue_bound` bounds the requests that wait",
    "memory_config": "`memory_fraction` or `num_blocks` sizes the KV cache",
    "offload": "the KV cache stays on the device",
    "quantization": "`quantization_mode` of the model's configuration quantises its weights",
}


SHAPING_DIRECTIVES = {"constraint", "gpus-per-node", "gpus_per_node", "gres", "nodelist", "partition"}
"""#SBATCH directives that are read as fields where `SlurmConfig.extra` has them."""


class MIIWarning(UserWarning):
    """A setting is accepted but does nothing here; the message says what happens instead."""


class _Model(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        protected_namespaces=(),
        populate_by_name=True,
        use_attribute_docstrings=True,
    )


def _canonical_dtype(value: Any) -> Any:
    short = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16", "float": "float32"}
    name = str(value).removeprefix("torch.")
    return short.get(name, name)


def _as_tokenizer(value: Any) -> Any:
    # DeepSpeed-MII's wrapper has the tokenizer inside.
    tokenizer = value if callable(value) else getattr(value, "tokenizer", value)
    if tokenizer is None or isinstance(tokenizer, str):
        return tokenizer
    if isinstance(tokenizer, Path):
        return str(tokenizer)
    if not (callable(tokenizer) and hasattr(tokenizer, "save_pretrained")):
        raise ValueError("must be a folder, a name on the Hugging Face hub, or a tokenizer of transformers")
    return tokenizer


def _as_template(value: Any) -> Any:
    if value is None or (isinstance(value, str) and "{" in value):
        return value
    try:
        return read_bounded(Path(value).expanduser()).decode()
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"must be a Jinja template, or a file with one: {error}") from None


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str | int) else value


def _as_grammar(value: Any) -> Any:
    """Return what answers are to be as JSON with a single key: json, regex, choice or grammar."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = from_json(value)
        except ValueError as error:
            raise ValueError(f"must be a dictionary, or one as JSON: {error}") from None
    kinds = ("json", "json_object", "regex", "choice", "grammar")
    if not isinstance(value, Mapping):
        raise ValueError(f"must be a dictionary with one of {', '.join(kinds)}")
    given = {kind: wanted for kind, wanted in value.items() if wanted is not None and wanted is not False}
    for kind in given.keys() - set(kinds):
        raise ValueError(unknown_name("field", str(kind), kinds))
    if len(given) != 1:
        raise ValueError(f"give one of {', '.join(kinds)}, not {' and '.join(given) or 'none'}")
    ((kind, wanted),) = given.items()
    if kind == "json_object":
        kind, wanted = "json", {"type": "object"}
    try:
        if kind == "json" and isinstance(wanted, str):
            wanted = from_json(wanted)
        text = json.dumps({kind: wanted}, ensure_ascii=False, allow_nan=False)
        size = len(text.encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{kind} is not to be written as JSON: {error}") from None
    if kind == "json":
        is_right, right = isinstance(wanted, Mapping), "a JSON schema, as a dictionary or as JSON"
    elif kind == "choice":
        is_right = isinstance(wanted, list | tuple) and bool(wanted) and all(isinstance(one, str) for one in wanted)
        right = "a list of one or more strings"
    else:
        is_right, right = isinstance(wanted, str) and bool(wanted), "a string that is not empty"
    if not is_right:
        raise ValueError(f"{kind} must be {right}, not {shown(wanted)}")
    if size > GRAMMAR_BYTES:
        raise ValueError(f"{kind} has {size} bytes as JSON, and {GRAMMAR_BYTES} are allowed")
    return text


def _written_as(how: str, pattern: str) -> AfterValidator:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"must be {how}")
        return value

    return AfterValidator(check)


_Walltime = _written_as('minutes, "H:MM:SS" or "D-HH:MM:SS"', r"\d+|\d+:\d{2}(:\d{2})?|\d+-\d{1,2}(:\d{2}){0,2}")
_Memory = _written_as('a number with a unit, such as "64G"', r"\d+[KMGT]?B?")
_Sharing = _written_as('"group:NAME" with the name of a Unix group', r"group:[A-Za-z_][A-Za-z0-9_.-]*")


TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class GenerateParamsConfig(_Model):
    """The options of one request: names, defaults and ranges. Lengths are in tokens.

    Names and defaults are DeepSpeed-MII's, as far as it has them.
    """

    max_length: int | None = Field(None, ge=1, le=2**31 - 1)
    """Bound on prompt plus answer. None means the deployment's; more than that is cut to it."""
    max_new_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    """Bound on the answer. None leaves it to `max_length`."""
    min_new_tokens: int = Field(0, ge=0, le=2**31 - 1)
    """The answer does not end before this many tokens, neither by end-of-sequence nor by a stop string."""
    do_sample: bool = True
    """False takes the most likely token at every step."""
    temperature: float | None = Field(None, ge=0, le=100)
    """Divides the logits before sampling. None is 1; 0 takes the most likely token at every step."""
    top_p: float = Field(0.9, gt=0, le=1)
    """Sample from the smallest set of tokens whose probabilities add up to this."""
    top_k: int | None = Field(None, ge=1, le=2**31 - 1)
    """Sample from this many most likely tokens. None takes all; more than the vocabulary is all, too."""
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    """Divides positive and multiplies negative logits of tokens seen before (as transformers does)."""
    seed: int | None = Field(None, ge=0, le=2**63 - 1)
    """The same seed gives the same text, whatever else is in the batch."""
    stop: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = Field((), max_length=64)
    """The answer ends before the first of these strings. At most 64 strings of 1 to 1024 characters, and no more than
    65536 characters of them for all `num_return_sequences` answers together."""
    ignore_eos: bool = False
    """Do not end at the end-of-sequence token."""
    return_full_text: bool = False
    """Begin the answer with the prompt."""
    num_return_sequences: int = Field(1, ge=1, le=64)
    """How many answers to give to the prompt. Each beyond the first adds one to `seed`."""
    logprobs: bool = False
    """Give the natural logarithm of each generated token's probability under the model."""
    top_logprobs: int = Field(0, ge=0, le=20)
    """With `logprobs`, also those of this many most likely tokens at each place."""
    prompt_logprobs: bool = False
    """Give log probabilities of the prompt's own tokens, too, but for the first one's. Nothing of the prompt is taken
    from what others have computed."""
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    """Subtracted from the logit of a token for each time that the answer has it (as OpenAI does)."""
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    """Subtracted from the logits of all tokens that the answer has (as OpenAI does)."""
    logit_bias: dict[TokenId, Bias] = Field({}, max_length=300)
    """Added to the logits of tokens, by their ids. At most 300 of them, each from -100 to 100."""
    stream: bool = False
    """Send each piece as it is made, instead of the whole answer at its end."""
    stop_token_ids: Annotated[tuple[int, ...], BeforeValidator(_as_tuple)] = Field((), max_length=64)
    """The answer ends with any of these tokens, which has no text. At most 64."""
    add_special_tokens: bool = True
    """Let the tokenizer put its special tokens, such as that of the beginning, around a prompt of text."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the answer's text."""

    structured_outputs: Annotated[str | None, BeforeValidator(_as_grammar)] = None
    """Hold answers to a grammar: a dictionary with one of `json` (a JSON schema), `json_object` (true), `regex`,
    `choice` (a list of strings), `grammar` (as Lark or GBNF write one), or the same as JSON; at most 65536 bytes of it.
    Names are vLLM's. An answer ends only where it is complete, or at a stop string, or with its bounds in tokens."""

    @field_validator("stop")
    @classmethod
    def _stop_strings_are_short(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        for text in stop:
            if not 1 <= len(text) <= 1024:
                raise ValueError(f"a stop string has 1 to 1024 characters, one here has {len(text)}")
        return stop

    @field_validator("stop_token_ids")
    @classmethod
    def _token_ids_are_such(cls, stop_token_ids: tuple[int, ...]) -> tuple[int, ...]:
        for token_id in stop_token_ids:
            if not 0 <= token_id < 2**31:
                raise ValueError(f"a token id is a number from 0 on, not {token_id}")
        return stop_token_ids

    @model_validator(mode="after")
    def _lengths_fit(self) -> GenerateParamsConfig:
        if self.top_logprobs and not (self.logprobs or self.prompt_logprobs):
            raise ValueError(f"top_logprobs={self.top_logprobs} needs logprobs=True")
        bound = self.max_new_tokens
        if bound is not None and self.min_new_tokens > bound:
            raise ValueError(f"min_new_tokens={self.min_new_tokens} exceeds max_new_tokens={bound}")
        if (characters := sum(map(len, self.stop)) * self.num_return_sequences) > STOP_CHARACTERS:
            raise ValueError(
                f"stop: its strings have {characters} characters for num_return_sequences={self.num_return_sequences} "
                f"answers, and {STOP_CHARACTERS} are allowed"
            )
        if self.num_return_sequences > 1 and self.greedy:
            raise ValueError(
                "num_return_sequences above 1 needs do_sample=True and a temperature: greedy answers are all alike"
            )
        return self

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken at every step."""
        return not self.do_sample or self.temperature == 0


class EngineConfig(_Model):
    """How a replica's engine spends its memory and time. None means: chosen from what is there, and logged.

    DeepSpeed's RaggedInferenceEngineConfig is accepted as well, as an object or a dictionary.
    """

    engine: Literal["deepspeed", "echo"] = "deepspeed"
    """"echo" answers with the prompt's own words and needs neither torch nor a model: for trying things out."""
    max_batch_size: int | None = Field(None, ge=1)
    """Sequences that run at once."""
    max_batch_tokens: int | None = Field(None, ge=1)
    """Tokens per step; a longer prompt is read in chunks."""
    page_size: int | None = Field(None, ge=1)
    """Tokens per block of the KV cache."""
    num_blocks: int | None = Field(None, ge=1)
    """Blocks of the KV cache."""
    prefix_sharing: bool = True
    """Compute the beginning that prompts have in common once, as long as the cache holds it. How soon an answer begins
    then tells whether another prompt began alike lately: False where those who share a deployment must not know."""
    memory_fraction: float = Field(0.8, gt=0, le=1)
    """The part of this rank's free memory that weights and KV cache may take together."""
    queue_bound: int = Field(1024, ge=1)
    """Requests that may wait; more are refused with QueueFullError. Those of guests are counted apart, see `limits`."""
    threads: int | None = Field(None, ge=1)
    """CPU threads per rank; None is its share of the cores, and one beside a GPU."""
    step_timeout: float = Field(120.0, gt=0)
    """Seconds after which a replica that has requests in hand and makes no step is formed anew. One step may be long:
    a large prefill on CPUs, or the first of a shape, for which kernels are compiled. Processes that are stopped, and
    ranks that are lost, are noticed within 10 seconds all the same."""
    attention: Literal["auto", "gather", "cpu", "triton"] = "auto"
    """How tokens attend to the KV cache. "auto" is the fastest that works; "gather" works everywhere; "cpu" is a kernel
    for CPUs, compiled at first use; "triton" are kernels for GPUs."""
    cuda_graphs: bool = True
    """Replay decode steps on CUDA as graphs. Without effect on CPU."""
    compile: bool = True
    """Compile the layers of decode steps on CUDA with torch.compile. The first start on a host takes longer."""
    echo_delay: float = Field(0.0, ge=0)
    """Seconds that the echo engine takes for a token."""

    @model_validator(mode="before")
    @classmethod
    def _read_deepspeeds(cls, values: Any) -> Any:
        if isinstance(values, cls):
            return values
        if isinstance(values, BaseModel):
            values = values.model_dump(exclude_unset=True)
        if not isinstance(values, Mapping):
            return values
        # What DeepSpeed-MII overwrites with its own `tensor_parallel` has no meaning here either.
        own = {name: value for name, value in values.items() if name not in ("tensor_parallel", "tp")}
        theirs = {**(own.pop("manager", None) or {}), **(own.pop("state_manager", None) or {})}
        quantization = own.pop("quantization", None) or {}
        theirs |= {"quantization": mode} if (mode := quantization.get("quantization_mode")) else {}
        renamed = {new: theirs.pop(old) for old, new in STATE_MANAGER.items() if old in theirs}
        for name in [name for name, value in theirs.items() if value]:
            instead = SUPERSEDED_ENGINE_FIELDS.get(name, "EngineConfig lists what has")
            warnings.warn(f"'inference_engine_config.{name}' has no effect here: {instead}", MIIWarning, stacklevel=2)
        return {**renamed, **own}


class ModelConfig(_Model):
    """What is served, and in what shape."""

    model_name_or_path: str = ""
    """A local folder, or a name on the Hugging Face hub."""
    adapter: str | None = None
    """A folder with a LoRA adapter as peft saves it, which is merged into the weights as they load."""
    tokenizer: Annotated[Any, AfterValidator(_as_tokenizer)] = None
    """Folder or hub name of the tokenizer, or a tokenizer of transformers; None takes the model's own."""
    chat_template: Annotated[str | None, BeforeValidator(_as_template)] = None
    """Jinja template that makes a prompt of a conversation, or a file with it; None takes the tokenizer's own."""
    task: TaskType = TaskType.TEXT_GENERATION
    tensor_parallel: int = Field(1, ge=1, le=1024)
    """Ranks, and so devices, per replica."""
    replica_num: int = Field(1, ge=1, le=1024)
    max_length: int | None = Field(None, ge=1)
    """Bound on prompt plus answer, in tokens, of all requests, and the default of each; None: the model's context."""
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], BeforeValidator(_canonical_dtype)] = "auto"
    """"auto" takes the checkpoint's; on a processor without instructions for that, float32, and says so."""
    quantization_mode: Literal["int8", "int4", "fp8"] | None = None
    """Hold the weights of linear layers in 8 or 4 bits, made of plain ones as they load; rows and sums stay in
    `dtype`. None holds all weights in `dtype`."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """"auto" is CUDA where it is, else CPU."""
    inference_engine_config: EngineConfig = EngineConfig()
    trust_remote_code: bool = False

    @model_validator(mode="before")
    @classmethod
    def _drop_superseded(cls, values: Any) -> Any:
        return _without_superseded(values, SUPERSEDED_MODEL_FIELDS)

    @property
    def world_size(self) -> int:
        """Ranks of the whole deployment."""
        return self.tensor_parallel * self.replica_num


class SlurmConfig(_Model):
    """What to ask Slurm for. None leaves it to the cluster's own defaults."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: Annotated[str, _Walltime] | None = None
    """Walltime as Slurm writes it: minutes, "H:MM:SS" or "D-HH:MM:SS". None: the partition's own."""
    gpus_per_node: int | None = Field(None, ge=0)
    """None: one for each rank of a node, where the partition has GPUs; 0: none."""
    gres: str | None = None
    """Generic resources per node, such as "gpu:a100:4" for GPUs of a type."""
    cpus_per_task: int | None = Field(None, ge=1)
    mem: Annotated[str, _Memory] | None = None
    """Memory per node, such as "64G"."""
    constraint: str | None = None
    reservation: str | None = None
    nodelist: str | None = None
    exclude: str | None = None
    exclusive: bool = False
    tasks_per_node: int | None = Field(None, ge=1)
    """Ranks per node. None: as many whole replicas as the GPUs of a node hold, one where none are given."""
    mpi: str = "pmix"
    """The plugin that srun starts MPI ranks with; `srun --mpi=list` names those of the cluster."""
    srun_args: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    """Shell lines to run in the job before the ranks, such as "module load openmpi"."""
    python: str | None = None
    """The Python of the ranks, as a shell command; None takes the one that runs now."""
    extra: dict[str, str | int | bool] = {}
    """Any other #SBATCH directive, such as {"mail-type": "FAIL"}."""

    @model_validator(mode="before")
    @classmethod
    def _read_extra(cls, values: Any) -> Any:
        """Take out of `extra` what the shape of the job depends on: it has fields of its own."""
        if not isinstance(values, Mapping) or not isinstance(values.get("extra"), Mapping):
            return values
        values, extra = dict(values), dict(values["extra"])
        for name in extra.keys() & SHAPING_DIRECTIVES:
            field, value = str(name).replace("-", "_"), extra.pop(name)
            if field == "gpus_per_node" and not str(value).isdecimal():
                field, value = "gres", f"gpu:{value}"
            if values.get(field) not in (None, value):
                raise ValueError(
                    f"extra['{name}']={value!r}: {field}={values[field]!r} says otherwise; give one of them"
                )
            values[field] = value
        return {**values, "extra": extra}

    @property
    def gpus(self) -> int | None:
        """GPUs per node, as far as `gpus_per_node` or `gres` say it."""
        if self.gpus_per_node is not None:
            return self.gpus_per_node
        return sum(gpus_in(self.gres or "").values()) or None

    @field_validator("time", mode="before")
    @classmethod
    def _minutes_as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("*")
    @classmethod
    def _single_line(cls, value: Any) -> Any:
        # A line break would begin a directive or a command of its own in the batch script.
        texts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, tuple) else [value]
        if any("\n" in text or "\r" in text for text in texts if isinstance(text, str)):
            raise ValueError("must be a single line")
        return value


class LimitsConfig(_Model):
    """What owner and guests may have in hand, all but `guest_calls` at each replica.

    Neither's part depends on what the other has, so that the owner always gets in.
    """

    owner_running: int | None = Field(None, ge=1)
    """Answers to the owner that are computed at once; others wait. None: as many as fit."""
    owner_waiting: int | None = Field(None, ge=1)
    """Requests of the owner that may wait; more are refused with QueueFullError. None: `queue_bound`."""
    owner_waiting_bytes: int = Field(2**28, ge=1)
    """Bytes of prompts in the owner's requests that may wait; one request may in any case."""
    guest_running: int | None = Field(None, ge=1)
    """Answers to all guests together that are computed at once; others wait. None: as many as fit, which are half of
    those of a full batch where the owner has as many."""
    guest_waiting: int | None = Field(None, ge=1)
    """Requests of all guests together that may wait. None: half of `queue_bound`."""
    guest_waiting_bytes: int = Field(2**27, ge=1)
    """Bytes of prompts in the guests' requests that may wait."""
    guest_calls: int = Field(2048, ge=1)
    """Calls of all guests together that the balancer may have open, of which a client needs one for all requests."""


class MIIConfig(_Model):
    """A deployment: its model, its name, and where it runs."""

    deployment_name: str = ""
    """The name it has in the registry, with dashes for what is no letter, digit, dot or underscore. Empty: made from
    the model's name."""
    model_conf: ModelConfig = Field(
        default_factory=ModelConfig, validation_alias=AliasChoices("model_config", "model_conf")
    )
    cluster: Literal["auto", "slurm", "local"] = "auto"
    """"auto" is Slurm where sbatch is on PATH, else this machine."""
    slurm: SlurmConfig = SlurmConfig()
    port_number: int = Field(0, ge=0, le=65535)
    """The balancer's port; 0 takes any free one."""
    gateway: bool = False
    """Answer the OpenAI API in the job, over HTTPS; see the command `mii-hpc env`."""
    gateway_port: int = Field(0, ge=0, le=65535)
    """The gateway's port; 0 takes any free one."""
    home: Path = Field(default_factory=lambda: default_home(), validate_default=True)
    """The folder of the registry and the run directories, on a filesystem that all nodes share."""
    share: Annotated[str, _Sharing] | None = None
    """"group:NAME" lets the members of a Unix group generate and ask for the status, but not terminate."""
    limits: LimitsConfig = LimitsConfig()
    wait: bool = True
    """False makes serve() return once the job is submitted."""
    keep_runs: float = Field(30.0, gt=0)
    """Days after which serve() removes the run directories, with their logs, of deployments that have ended."""
    startup_timeout: float = Field(1800.0, gt=0)
    """Seconds from the job's start until it must be ready."""
    migration_limit: int = Field(3, ge=0)
    """How often a request may move to another replica because the one that has it was lost."""
    hold_seconds: float = Field(120.0, ge=0)
    """Seconds that a request waits while no replica can take it."""
    queue_timeout: float | None = Field(None, gt=0)
    """Seconds that the job may wait in the queue; None is no limit."""
    uptime: Annotated[str, _Walltime] | None = None
    """How long the name is served in all, written as `slurm.time`: before one job's walltime is over, another one takes
    its place. None is as long as one job lasts."""
    handover: float = Field(600.0, gt=0)
    """With `uptime`: seconds before the end of a job's walltime by which the next job is to be ready."""

    @model_validator(mode="before")
    @classmethod
    def _drop_superseded(cls, values: Any) -> Any:
        values = _without_superseded(values, SUPERSEDED_MII_FIELDS)
        if not isinstance(values, dict):
            return values
        return {RENAMED_MII_FIELDS.get(name, name): value for name, value in values.items()}

    @property
    def shared_group(self) -> str | None:
        """The Unix group that the deployment is shared with."""
        return self.share.removeprefix("group:") if self.share else None

    @model_validator(mode="after")
    def _handover_fits(self) -> MIIConfig:
        if self.uptime is not None and self.slurm.time is not None:
            walltime = seconds_of(self.slurm.time)
            if self.handover >= walltime:
                raise ValueError(
                    f"handover={self.handover:g}: must be less than slurm.time={self.slurm.time!r}, {walltime} seconds"
                )
        return self

    @field_validator("home")
    @classmethod
    def _absolute_home(cls, home: Path) -> Path:
        return Path(os.path.abspath(home.expanduser()))  # noqa: PTH100 (keeps symbolic links as they are)

    @field_validator("deployment_name")
    @classmethod
    def _safe_name(cls, name: str) -> str:
        if name and (len(name) > NAME_LENGTH or not plain_name(name)):
            raise ValueError(f"a name has 1 to {NAME_LENGTH} characters, a letter or digit among them")
        return plain_name(name)


def seconds_of(walltime: str) -> int:
    """Return the seconds of a walltime as Slurm writes it: "M", "M:S", "H:M:S", "D-H", "D-H:M" or "D-H:M:S"."""
    days, dash, rest = walltime.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    hours, minutes, seconds = ([*parts, 0, 0] if dash else [0] * (len(parts) < 3) + [*parts, 0])[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def default_home() -> Path:
    """Return `$MII_HPC_HOME`, or `~/.mii_hpc` where it is not set."""
    return Path(os.environ.get("MII_HPC_HOME") or "~/.mii_hpc")


Config = TypeVar("Config", bound=_Model)


def validate(model: type[Config], values: Mapping[str, Any]) -> Config:
    """Make a configuration of the given class.

    Raises ConfigError (UnknownArgument where all mistakes are names), or InvalidRequestError for the options of a
    request, with a sentence for each mistake: field, value, and what is allowed. Unknown names are answered with the
    closest valid ones.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        kind: type[ConfigError | InvalidRequestError] = ConfigError
        if model is GenerateParamsConfig:
            kind = InvalidRequestError
        elif all(mistake["type"] == "extra_forbidden" for mistake in error.errors()):
            kind = UnknownArgument
        sentences = [_sentence(model, mistake) for mistake in error.errors(include_url=False)[:MOST_SENTENCES]]
        more = error.error_count() - len(sentences)
        raise kind(printable("; ".join([*sentences, *([f"and {more} more"] if more else [])]))) from None


def resolve(
    model_name_or_path: str = "",
    model_config: Mapping[str, Any] | ModelConfig | None = None,
    mii_config: Mapping[str, Any] | MIIConfig | str | Path | None = None,
    **kwargs: Any,
) -> MIIConfig:
    """Bring the arguments of serve() together into one configuration.

    A keyword is any field of ModelConfig or MIIConfig. A string or path for `mii_config` is a YAML file; whatever it
    says, an argument may say otherwise, but no two arguments may contradict each other.
    Raises UnknownArgument for unknown names, ConfigError for wrong or contradictory values, or a missing model.
    """
    file, deployment = {}, {}
    if isinstance(mii_config, str | Path):
        file = read(mii_config)
    else:
        deployment = _as_mapping(mii_config, "mii_config")
    file_model = _model_in(file)
    model = _model_in(deployment)
    _add(model, _as_mapping(model_config, "model_config"))
    if model_name_or_path:
        _add(model, {"model_name_or_path": str(model_name_or_path)})
    model_fields = {*ModelConfig.model_fields, *SUPERSEDED_MODEL_FIELDS}
    mii_fields = {*MIIConfig.model_fields, *SUPERSEDED_MII_FIELDS, *RENAMED_MII_FIELDS} - {"model_conf"}
    for name, value in kwargs.items():
        if name not in model_fields | mii_fields:
            raise UnknownArgument(unknown_name("keyword", name, model_fields | mii_fields))
        _add(model if name in model_fields else deployment, {name: value})
    deployment, model = {**file, **deployment}, {**file_model, **model}
    if isinstance(deployment.get("slurm"), SlurmConfig):
        deployment["slurm"] = deployment["slurm"].model_dump()
    try:
        config = validate(MIIConfig, {**deployment, "model_config": model})
    except ConfigError as error:
        raise (type(error)(f"{error} (mii_config='{mii_config}')") if file else error) from None
    if not config.model_conf.model_name_or_path and config.model_conf.inference_engine_config.engine != "echo":
        raise ConfigError("model_name_or_path='': name a model folder or a model on the Hugging Face hub")
    if not config.deployment_name:
        config = config.model_copy(update={"deployment_name": default_name(config.model_conf)})
    return config


def default_name(model: ModelConfig) -> str:
    """Return the deployment name made from the model's: its last part, with unsafe characters as dashes."""
    last = model.model_name_or_path.rstrip("/").rsplit("/", 1)[-1] or model.inference_engine_config.engine
    return plain_name(last)[:NAME_LENGTH] or "model"


def plain_name(name: str) -> str:
    """Return a name with dashes for what file names, Slurm or a shell might take for something else."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-")


def is_name(name: str) -> bool:
    """Whether a deployment can have that name."""
    return 0 < len(name) <= NAME_LENGTH and name == plain_name(name)


def unknown_name(what: str, name: str, valid: Iterable[str]) -> str:
    """Return a sentence that answers an unknown, perhaps dotted, name with the closest valid ones, or with all."""
    valid = sorted(valid)
    name = one_line(name, 80)
    close = difflib.get_close_matches(name.rpartition(".")[2], valid, n=3)
    if close:
        return f"unknown {what} '{name}': did you mean {' or '.join(repr(c) for c in close)}?"
    return f"unknown {what} '{name}': valid are {', '.join(valid)}"


def _as_mapping(config: Mapping[str, Any] | _Model | None, name: str) -> dict[str, Any]:
    if config is None:
        return {}
    if isinstance(config, _Model):
        return config.model_dump(exclude_unset=True)
    if isinstance(config, Mapping):
        return dict(config)
    raise ConfigError(f"{name}={config!r}: must be a dictionary or a configuration object")


def _model_in(deployment: dict[str, Any]) -> dict[str, Any]:
    """Take the model's part out of the fields of MIIConfig, and return it."""
    fields: dict[str, Any] = {}
    for name in ("model_config", "model_conf"):
        _add(fields, _as_mapping(deployment.pop(name, None), name))
    return fields


def _add(fields: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add fields to others. Raises ConfigError when one is there already with another value."""
    for name, value in more.items():
        if name in fields and fields[name] != value:
            raise ConfigError(
                f"{name}={shown(value)}: another argument says {name}={shown(fields[name])}; give one of them"
            )
        fields[name] = value


def read(file: str | Path) -> dict[str, Any]:
    """Return the fields in a YAML file, not yet validated. Raises ConfigError when it is no such file."""
    try:
        loaded = _load_yaml(read_bounded(file, YAML_BYTES).decode())
    except RecursionError:
        raise ConfigError(f"mii_config='{file}': not a readable YAML file: it is nested too deeply") from None
    # PyYAML lets many errors of Python pass: of numbers, dates and tags that are none.
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, yaml.YAMLError) as error:
        raise ConfigError(f"mii_config='{file}': not a readable YAML file: {one_line(error)}") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"mii_config='{file}': the file must hold fields of MIIConfig, not {shown(loaded)}")
    return loaded


def _load_yaml(text: str) -> Any:
    """Return what a YAML document holds. Raises ValueError when its aliases make far more of it than is written."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _weight(node, {}) > YAML_NODES:
            raise ValueError("its aliases repeat too much")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _weight(node: yaml.Node, known: dict[int, float]) -> float:
    """Return how many nodes there are with every alias written out; infinite where one leads to itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        below = itertools.chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
        children = () if isinstance(node, yaml.ScalarNode) else below
        known[id(node)] = 1 + sum(_weight(child, known) for child in children)
    return known[id(node)]


def _without_superseded(values: Any, superseded: Mapping[str, str]) -> Any:
    if not isinstance(values, dict):
        return values
    for name in superseded.keys() & values.keys():
        if name in SILENT and values[name] == SILENT[name]:
            continue
        warnings.warn(f"'{name}' has no effect here: {superseded[name]}", MIIWarning, stacklevel=2)
    return {name: value for name, value in values.items() if name not in superseded}


def _sentence(model: type[_Model], mistake: Any) -> str:
    location = [one_line(part, 80) for part in mistake["loc"] if part not in ("model_config", "model_conf")]
    if mistake["type"] == "extra_forbidden":
        owner: Any = model
        for part in mistake["loc"][:-1]:
            owner = owner.model_fields["model_conf" if part == "model_config" else part].annotation
        return unknown_name("field", ".".join(location), owner.model_fields)
    message = mistake["msg"].removeprefix("Value error, ")
    value = mistake["input"]
    if not location or isinstance(value, Mapping):
        return message if not location else f"{'.'.join(location)}: {message}"
    return f"{'.'.join(location)}={shown(value)}: {message}"
