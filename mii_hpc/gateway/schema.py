"""What the HTTP face is asked: OpenAI's fields and vLLM's additions, and what they mean here.

Unknown fields are ignored. Known ones that cannot be honoured are refused: an answer without them would be another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError, model_validator

from mii_hpc.config import Bias, TokenId
from mii_hpc.errors import (
    DeploymentError,
    InvalidRequestError,
    MIIError,
    QueueFullError,
    RegistryError,
    RequestError,
    RequestTimeoutError,
)
from mii_hpc.generation import Chat, Prompt, as_prompts

COMPLETION_TOKENS = 16
"""What a completion may have where the request does not say it, as OpenAI has it."""
TOP_LOGPROBS = 20
ANYTHING_BUT_TEXT = "only text is understood"

_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "tools": (([],), "tools are not called here"),
    "functions": (([],), "functions are not called here"),
    "tool_choice": (("none", "auto"), "tools are not called here"),
    "function_call": (("none", "auto"), "functions are not called here"),
    "audio": ((), ANYTHING_BUT_TEXT),
    "modalities": ((["text"],), ANYTHING_BUT_TEXT),
    "suffix": (("",), "text is only continued, not filled in"),
    "best_of": ((1,), "all answers that are made are returned; use n"),
    "prediction": ((), "it is not supported"),
    "prompt_logprobs": ((), "use echo with logprobs, on /v1/completions"),
}
"""Known fields that mean something else than nothing: the values that ask for nothing, and what to say of others."""


class RefusedError(InvalidRequestError):
    """A field of a request is wrong.

    Attributes:
        param: its name.
        status: HTTP's status for it.
        code: OpenAI's code for it, where there is one.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


class StreamOptions(BaseModel):
    """How a stream is to be."""

    include_usage: bool = False


class Tokenize(BaseModel):
    """A request to /tokenize: a prompt or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False
    chat_template_kwargs: dict[str, Any] = {}

    def as_prompt(self) -> Prompt:
        """Return the prompt. Raises RefusedError unless there is exactly one."""
        if (self.prompt is None) == (self.messages is None):
            raise RefusedError("prompt, messages: give one of them", "prompt")
        if self.messages is None:
            return self.prompt or ""
        return _conversation(self.messages, not self.add_generation_prompt, self.chat_template_kwargs)


class Detokenize(BaseModel):
    """A request to /detokenize."""

    model: str | None = None
    tokens: list[int]


class Arguments(RootModel[dict[str, Any]]):
    """A request to DeepSpeed-MII's route: the arguments of generate(), but for those that are no JSON."""

    @model_validator(mode="after")
    def _prompts_are_there(self) -> Self:
        if "prompts" not in self.root:
            raise RefusedError("prompts: there are none", "prompts")
        if "streaming_fn" in self.root:
            raise RefusedError("streaming_fn: not over HTTP; use /v1/completions with stream", "streaming_fn")
        return self


class Generation(BaseModel):
    """What completions and chat completions have in common. None is the model's own default, or else OpenAI's."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model: str
    max_tokens: int | None = Field(None, ge=0)
    min_tokens: int = Field(0, ge=0)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    """-1 and 0 take all tokens."""
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[TokenId, Bias] = Field({}, max_length=300)
    n: int = Field(1, ge=1, le=64)
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] = []
    response_format: Any = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_missed(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, (harmless, said) in _REFUSED.items():
            if values.get(name) is not None and values[name] not in harmless:
                raise RefusedError(f"{name}: {said}", name)
        return {name: value for name, value in values.items() if value is not None}

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to end with the usage."""
        return self.stream_options.include_usage

    def options(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of GenerateParamsConfig that mean the same. `defaults` are those that the model has."""
        chosen = {"temperature": 1.0, "top_p": 1.0, "top_k": None, "repetition_penalty": 1.0, **defaults}
        for name in ("temperature", "top_p", "top_k", "repetition_penalty"):
            if (value := getattr(self, name)) is not None:
                chosen[name] = value
        if chosen["top_k"] is not None and chosen["top_k"] < 1:
            chosen["top_k"] = None
        if self.n > 1 and chosen["temperature"] == 0:
            raise RefusedError(f"n={self.n}: more than one answer needs a temperature above 0", "n")
        return {
            **chosen,
            "structured_outputs": self._structured_outputs(),
            "max_new_tokens": 1 if self.max_tokens == 0 else self.max_tokens,
            "min_new_tokens": self.min_tokens,
            "seed": None if self.seed is None else self.seed % 2**63,
            "stop": [self.stop] if isinstance(self.stop, str) else self.stop or [],
            "stop_token_ids": self.stop_token_ids,
            "ignore_eos": self.ignore_eos,
            "num_return_sequences": self.n,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "logit_bias": self.logit_bias,
            "logprobs": self.top_logprobs_wanted is not None,
            "top_logprobs": self.top_logprobs_wanted or 0,
            "prompt_logprobs": self.begins_with_prompt and self.top_logprobs_wanted is not None,
        }

    def _structured_outputs(self) -> dict[str, Any] | None:
        """Return what answers are held to, in the one form that is ours, of the several that there are."""
        asked: dict[str, dict[str, Any]] = {}
        if self.response_format is not None and (wanted := _of_format(self.response_format)):
            asked["response_format"] = wanted
        if self.structured_outputs:
            asked["structured_outputs"] = self.structured_outputs
        for kind in ("json", "regex", "choice", "grammar"):
            if (value := getattr(self, f"guided_{kind}")) not in (None, "", []):
                asked[f"guided_{kind}"] = {kind: value}
        if len(asked) > 1:
            raise RefusedError(f"{', '.join(asked)}: give one of them", next(iter(asked)))
        return next(iter(asked.values()), None)

    def prompts(self) -> list[Prompt]:
        """Return what to answer. Raises InvalidRequestError when there is nothing, or it cannot be read."""
        raise NotImplementedError

    @property
    def begins_with_prompt(self) -> bool:
        """Whether an answer is to begin with its prompt."""
        return False

    @property
    def top_logprobs_wanted(self) -> int | None:
        """How many likely tokens to tell of at each place; None asks for no log probabilities at all."""
        raise NotImplementedError


class Completion(Generation):
    """A request to /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(COMPLETION_TOKENS, ge=0)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS)

    def prompts(self) -> list[Prompt]:
        """See Generation."""
        prompts = as_prompts(self.prompt)
        if not prompts:
            raise RefusedError("prompt: there is none", "prompt")
        return prompts

    @model_validator(mode="after")
    def _there_is_something_to_return(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise RefusedError("max_tokens=0: there is nothing to return without echo", "max_tokens")
        return self

    @property
    def begins_with_prompt(self) -> bool:
        """See Generation."""
        return self.echo

    @property
    def top_logprobs_wanted(self) -> int | None:
        """See Generation."""
        return self.logprobs


class ChatCompletion(Generation):
    """A request to /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        if self.top_logprobs and not self.logprobs:
            raise RefusedError("top_logprobs: needs logprobs=true", "top_logprobs")
        return self

    def prompts(self) -> list[Prompt]:
        """See Generation."""
        continues = self.continue_final_message or not self.add_generation_prompt
        return [_conversation(self.messages, continues, self.chat_template_kwargs)]

    @property
    def top_logprobs_wanted(self) -> int | None:
        """See Generation."""
        return (self.top_logprobs or 0) if self.logprobs else None


Body = TypeVar("Body", bound=BaseModel)


def parse(model: type[Body], body: bytes) -> Body:
    """Return a request's body. Raises RefusedError, with a sentence that names the field."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        mistake = error.errors()[0]
        cause = mistake.get("ctx", {}).get("error")
        if isinstance(cause, RefusedError):
            raise cause from None
        # Of the shapes that a field may have, only the field is named.
        names = [str(part) for part in mistake["loc"][:1]]
        said = mistake["msg"].removeprefix("Value error, ")
        raise RefusedError(": ".join([*names, said]), names[0] if names else None) from None


def status_of(error: MIIError) -> int:
    """Return HTTP's status for an error."""
    match error:
        case RefusedError():
            return error.status
        case InvalidRequestError():
            return 400
        case QueueFullError():
            return 429
        case RequestTimeoutError():
            return 504
        case RequestError() if type(error) is RequestError:
            return 500
        case RequestError() | DeploymentError() | RegistryError():
            return 503
        case _:
            return 500


def error_body(error: MIIError, status: int) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    if isinstance(error, RefusedError):
        return body_of(str(error), status, error.code, error.param)
    code = {429: "queue_full", 503: "service_unavailable"}.get(status)
    return body_of(str(error), status, code, None)


def body_of(message: str, status: int, code: str | None, param: str | None) -> dict[str, Any]:
    """Return the body of a refusal."""
    kind = "invalid_request_error" if status < 429 else "rate_limit_error" if status == 429 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _of_format(response_format: Any) -> dict[str, Any] | None:
    """Return what OpenAI's response_format holds answers to. A schema is kept to, whether it is `strict` or not."""
    match response_format:
        case {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return {"json_object": True}
        case {"type": "json_schema", "json_schema": {"schema": schema}}:
            return {"json": schema}
    raise RefusedError(
        "response_format: must be {'type': 'text'}, {'type': 'json_object'}, or {'type': 'json_schema', 'json_schema': "
        "{'name': ..., 'schema': ...}}",
        "response_format",
    )


def _conversation(messages: list[dict[str, Any]], continues: bool, arguments: dict[str, Any]) -> Chat:
    return Chat(tuple(_message(message) for message in messages), continues, arguments)


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with its parts, all of which must be text, as one text."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") in ("text", "input_text") else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise RefusedError(f"messages: a part of type '{kind}' cannot be read: {ANYTHING_BUT_TEXT}", "messages")
        texts.append(text)
    return {**message, "content": "\n".join(texts)}
