"""The types of one generation, each once: what an engine is asked, what it answers, and how its pieces join.

The engine, the wire, the clients and the pipeline all speak of these. Imports no torch and no gRPC.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from mii_hpc.config import GenerateParamsConfig
from mii_hpc.constants import GenerationFinishReason
from mii_hpc.errors import InvalidRequestError


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt with its options. `id` is unique among the requests of an engine that have not ended."""

    id: str
    prompt: str
    params: GenerateParamsConfig


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
        index: which of the prompt's `num_return_sequences` this is.
        replica: index of the replica that served it.
    """

    generated_text: str
    prompt_length: int = 0
    generated_length: int = 0
    finish_reason: GenerationFinishReason = GenerationFinishReason.NONE
    token_ids: tuple[int, ...] = field(default=(), compare=False)
    logprobs: tuple[float, ...] = field(default=(), compare=False)
    index: int = field(default=0, compare=False)
    replica: int = field(default=0, compare=False)

    @property
    def ended(self) -> bool:
        """Whether the answer is complete with this piece."""
        return self.finish_reason is not GenerationFinishReason.NONE

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
class Load:
    """The load of an engine. `running` and `waiting` are requests; blocks are those of the KV cache."""

    running: int = 0
    waiting: int = 0
    free_blocks: int = 0
    total_blocks: int = 0
    generated_tokens: int = 0


Deliver = Callable[[Response | Exception], None]
"""Takes each piece of a request's answers, or the one error that ends it. Called on the engine's own thread,
so it must be quick and must not raise. Nothing is called after a request's last piece or its error."""


def as_prompts(prompts: str | Iterable[str]) -> list[str]:
    """Return one or more prompts as a list. Raises InvalidRequestError when they are neither a string nor strings."""
    if isinstance(prompts, Mapping):
        raise InvalidRequestError(
            f"prompts={prompts!r}: must be a string or a list of strings; of a query in a dictionary, "
            "as DeepSpeed-MII once had it, give its list"
        )
    texts = [prompts] if isinstance(prompts, str) else list(prompts) if isinstance(prompts, Iterable) else [None]
    if isinstance(prompts, Set) or not all(isinstance(text, str) for text in texts):
        raise InvalidRequestError("prompts: must be a string or a list of strings")
    return texts


def joined(pieces: Iterable[Response]) -> list[Response]:
    """Return the answers, by index, of which these are consecutive pieces; each goes as far as its pieces go."""
    answers: dict[int, list[Response]] = {}
    for piece in pieces:
        answers.setdefault(piece.index, []).append(piece)
    return [
        replace(
            parts[-1],
            generated_text="".join(part.generated_text for part in parts),
            token_ids=tuple(itertools.chain.from_iterable(part.token_ids for part in parts)),
            logprobs=tuple(itertools.chain.from_iterable(part.logprobs for part in parts)),
        )
        for _, parts in sorted(answers.items())
    ]
