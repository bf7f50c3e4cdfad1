"""The types of one generation, each once: what an engine is asked, what it answers, and how its pieces join.

The engine, the wire, the clients and the pipeline all speak of these. Imports no torch and no gRPC.
"""

from __future__ import annotations

import itertools
import secrets
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Self, TypeGuard

from mii_hpc.config import GenerateParamsConfig
from mii_hpc.constants import GenerationFinishReason
from mii_hpc.errors import InvalidRequestError


@dataclass(frozen=True)
class Chat:
    """A conversation, of which the model's chat template makes a prompt.

    Attributes:
        messages: mappings with "role" and "content", as the template takes them.
        continues: the answer continues the last message, instead of being a new one.
        arguments: further variables of the template.
    """

    messages: tuple[Mapping[str, Any], ...]
    continues: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Take any sequence for the messages. Raises InvalidRequestError when they are no messages."""
        object.__setattr__(self, "messages", tuple(self.messages))
        if not self.messages:
            raise InvalidRequestError("messages: a conversation has at least one")
        for message in self.messages:
            if not (isinstance(message, Mapping) and isinstance(message.get("role"), str)):
                raise InvalidRequestError(f"messages: {message!r} is no dictionary with a role and a content")


Prompt = str | tuple[int, ...] | Chat
"""A text, the token ids of one, or a conversation."""


@dataclass(frozen=True)
class ResumedAnswer:
    """What had come of an answer when its request was interrupted.

    Attributes:
        token_ids: the tokens that were delivered; of an answer that has ended they do not matter.
        characters: how many characters of text were delivered with them.
        ended: whether the answer is complete.
    """

    token_ids: tuple[int, ...] = ()
    characters: int = 0
    ended: bool = False


Caller = tuple[str, str]
"""Who asks: OWNER or GUEST, and the address that the connection comes from."""
OWNER, GUEST = "owner", "guest"


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt with its options. `id` is unique among the requests of an engine that have not ended.

    With `resume`, one for each of its answers, the request goes on where it was interrupted, perhaps elsewhere: as if
    the engine had generated those tokens itself. What was delivered before is not delivered again. With the same seed
    the whole is what it would have been without the interruption. `admitted` is one that another replica of the
    deployment had in hand: it is refused by no full queue, and waits behind none. Callers share an engine alike.
    Where it is no stream and `reports`, its first token comes at once, and what follows now and then.

    Raises InvalidRequestError for the full text of a prompt that is none, and for a `resume` that does not fit.
    """

    id: str
    prompt: Prompt
    params: GenerateParamsConfig
    resume: tuple[ResumedAnswer, ...] = ()
    admitted: bool = False
    caller: Caller = (OWNER, "")
    reports: bool = False

    def __post_init__(self) -> None:
        """Check what concerns prompt, options and resumption together."""
        answers = self.params.num_return_sequences
        if self.resume and (len(self.resume) != answers or all(answer.ended for answer in self.resume)):
            raise InvalidRequestError(
                f"resume: must have {answers} answer(s), as num_return_sequences says, and one that has not ended"
            )
        if self.params.return_full_text and not isinstance(self.prompt, str):
            raise InvalidRequestError("return_full_text=True: the prompt must be a text")

    @cached_property
    def size(self) -> int:
        """About how much the prompt holds: its characters, or 8 bytes for each token id."""
        if isinstance(self.prompt, Chat):
            return sum(len(str(value)) for message in self.prompt.messages for value in message.values())
        return len(self.prompt) if isinstance(self.prompt, str) else 8 * len(self.prompt)


@dataclass(frozen=True)
class Tokenization:
    """A prompt as the model sees it.

    Attributes:
        token_ids: its tokens.
        text: their text, special ones included.
        tokens: the bytes of each; those of a character may be spread over several.
    """

    token_ids: tuple[int, ...]
    text: str
    tokens: tuple[bytes, ...]


@dataclass(frozen=True)
class Description:
    """What is served.

    Attributes:
        max_length: bound on prompt plus answer, in tokens; None when it has none of its own.
        defaults: options of a request that the model's own generation_config recommends.
        chat_template: the Jinja template of its conversations; None where it has none.
        tokenizer: the class, special tokens and sizes of its tokenizer.
    """

    max_length: int | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    tokenizer: Mapping[str, Any] = field(default_factory=dict)


TopLogprobs = tuple[tuple[int, float], ...]
"""Tokens with the natural logarithms of their probabilities."""


@dataclass(repr=False)
class Response:
    """One answer, or, from a stream, the next piece of it.

    The texts of all pieces of an answer, joined, are the answer; each of them is valid Unicode. Two are equal when
    the fields that DeepSpeed-MII has are equal: text, lengths and finish reason.

    Attributes:
        generated_text: the text; of a piece, what is new. It may be empty.
        prompt_length: tokens in the prompt.
        generated_length: tokens generated; of a piece, so far.
        finish_reason: NONE in a stream until its last piece.
        token_ids: the generated tokens behind `generated_text`.
        logprobs: one natural logarithm per token of these, if the request asked for them.
        top_logprobs: for each of these the most likely tokens at its place with their logarithms, the likeliest first,
            if the request asked for them.
        prompt_logprobs: one logarithm per token of the prompt but the first, if the request asked for them; of a
            stream, the first piece of each answer has them.
        prompt_top_logprobs: the most likely tokens at the places of these.
        index: which of the prompt's `num_return_sequences` this is.
        replica: index of the replica that served it.
        migrations: how often its request went on elsewhere, because a replica or the balancer was lost.
    """

    generated_text: str
    prompt_length: int = 0
    generated_length: int = 0
    finish_reason: GenerationFinishReason = GenerationFinishReason.NONE
    token_ids: tuple[int, ...] = field(default=(), compare=False)
    logprobs: tuple[float, ...] = field(default=(), compare=False)
    index: int = field(default=0, compare=False)
    replica: int = field(default=0, compare=False)
    top_logprobs: tuple[TopLogprobs, ...] = field(default=(), compare=False)
    prompt_logprobs: tuple[float, ...] = field(default=(), compare=False)
    prompt_top_logprobs: tuple[TopLogprobs, ...] = field(default=(), compare=False)
    migrations: int = field(default=0, compare=False)

    @property
    def ended(self) -> bool:
        """Whether the answer is complete with this piece."""
        return self.finish_reason is not _NONE

    @classmethod
    def from_msg_dict(cls, msg: Mapping[str, Any]) -> Self:
        """Return the answer that to_msg_dict() has given."""
        return cls(**{**msg, "finish_reason": GenerationFinishReason(msg["finish_reason"])})

    def to_msg_dict(self) -> dict[str, str | int]:
        """Return the fields that DeepSpeed-MII has, fit for JSON."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.compare}

    def __str__(self) -> str:
        return self.generated_text

    def __repr__(self) -> str:
        return self.generated_text


@dataclass(frozen=True)
class Histogram:
    """How many values fell up to each bound, above the one before, and beyond the last; and their sum."""

    counts: tuple[int, ...] = ()
    sum: float = 0.0


class Observed:
    """Observes values, of which a histogram with these upper bounds can be had at any time."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float, count: int = 1) -> None:
        """Observe a value so many times."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    @property
    def histogram(self) -> Histogram:
        """What was observed."""
        return Histogram(tuple(self._counts), self._sum)


@dataclass(frozen=True)
class Load:
    """The load of an engine. `running` and `waiting` are requests; blocks are those of the KV cache.

    What it has done so far: tokens of the prompts that it has answered, and of the answers; tokens that it has looked
    for, and found, in what the KV cache holds of others' prompts; answers by their finish reason; and latencies in
    seconds, those of tokens for requests that stream; `queue_time` is from a request's arrival to its first step.
    """

    running: int = 0
    waiting: int = 0
    free_blocks: int = 0
    total_blocks: int = 0
    generated_tokens: int = 0
    prompt_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    finished: Mapping[str, int] = field(default_factory=dict)
    time_to_first_token: Histogram = Histogram()
    inter_token_latency: Histogram = Histogram()
    request_latency: Histogram = Histogram()
    queue_time: Histogram = Histogram()


_NONE = GenerationFinishReason.NONE  # an enumeration takes long to look a member up, and each token asks for it

Prompts = Prompt | Sequence[int] | Iterable[str | Sequence[int] | Chat]
"""One prompt or several."""
_NO_PROMPT = "prompts: must be a string or a list of strings; each may also be a list of token ids, or a Chat"

LATENCY_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKEN_BOUNDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5)
"""Bounds of the histograms of requests' and tokens' latencies, in seconds."""

PER_TOKEN = ("token_ids", "logprobs", "top_logprobs", "prompt_logprobs", "prompt_top_logprobs")
"""Fields of a Response that have an item for each token."""

Deliver = Callable[[Response | Exception], None]
"""Takes each piece of a request's answers, or the one error that ends it. Called on the engine's own thread,
so it must be quick and must not raise. Nothing is called after a request's last piece or its error."""


def as_prompts(prompts: Prompts) -> list[Prompt]:
    """Return one or more prompts as a list. Raises InvalidRequestError when they are no prompts.

    Integers alone are the token ids of one prompt.
    """
    if isinstance(prompts, Mapping):
        raise InvalidRequestError(
            f"prompts={prompts!r}: must be a string or a list of strings; of a query in a dictionary, "
            "as DeepSpeed-MII once had it, give its list"
        )
    if isinstance(prompts, str | Chat):
        return [prompts]
    if not isinstance(prompts, Iterable) or isinstance(prompts, Set | bytes):
        raise InvalidRequestError(_NO_PROMPT)
    several = list(prompts)
    return [tuple(several)] if _are_token_ids(several) else [as_prompt(prompt) for prompt in several]


def as_prompt(prompt: Any) -> Prompt:
    """Return one prompt. Raises InvalidRequestError when it is none."""
    if isinstance(prompt, str | Chat):
        return prompt
    if isinstance(prompt, Sequence) and not isinstance(prompt, bytes) and _are_token_ids(prompt):
        return tuple(prompt)
    raise InvalidRequestError(_NO_PROMPT)


def _are_token_ids(values: Sequence[Any]) -> TypeGuard[Sequence[int]]:
    return bool(values) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31 for value in values
    )


class Received:
    """What has come of a request's answers, piece by piece: from there the request can be resumed."""

    def __init__(self, answers: int, resume: Iterable[ResumedAnswer] = ()) -> None:
        """Expect so many answers, of which that much has come before."""
        so_far = tuple(resume) or (ResumedAnswer(),) * answers
        self._token_ids = [list(answer.token_ids) for answer in so_far]
        self._characters = [answer.characters for answer in so_far]
        self._ended = [answer.ended for answer in so_far]

    def take(self, piece: Response) -> None:
        """Note a piece."""
        self.add(piece.index, piece.token_ids, piece.generated_text, piece.ended)

    def add(self, index: int, token_ids: Iterable[int], text: str, ended: bool) -> None:
        """Note what a piece of one answer has."""
        self._token_ids[index].extend(token_ids)
        self._characters[index] += len(text)
        self._ended[index] |= ended

    @property
    def ended(self) -> bool:
        """Whether all answers are complete."""
        return all(self._ended)

    @property
    def resume(self) -> tuple[ResumedAnswer, ...]:
        """What a request that goes on from here says."""
        return tuple(
            ResumedAnswer((), 0, True) if ended else ResumedAnswer(tuple(token_ids), characters)
            for token_ids, characters, ended in zip(self._token_ids, self._characters, self._ended, strict=True)
        )


def new_seed() -> int:
    """Return a seed for a request that has none: who goes on after an interruption must draw what would have come."""
    return secrets.randbits(62)


def joined(pieces: Iterable[Response]) -> list[Response]:
    """Return the answers, by index, of which these are consecutive pieces; each goes as far as its pieces go."""
    answers: dict[int, list[Response]] = {}
    for piece in pieces:
        answers.setdefault(piece.index, []).append(piece)
    return [_join(parts) for _, parts in sorted(answers.items())]


def _join(parts: Sequence[Response]) -> Response:
    changes: dict[str, Any] = {"generated_text": "".join(part.generated_text for part in parts)}
    for name in PER_TOKEN:
        changes[name] = tuple(itertools.chain.from_iterable(getattr(part, name) for part in parts))
    return replace(parts[-1], **changes)
