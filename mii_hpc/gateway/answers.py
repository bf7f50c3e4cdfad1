"""How answers are written: the objects of OpenAI's API, whole and in the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from mii_hpc.constants import GenerationFinishReason
from mii_hpc.gateway.schema import Generation
from mii_hpc.generation import Response, Tokenization, TopLogprobs

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""


@dataclass
class Shape:
    """How the answers to one request are written.

    Attributes:
        model: the name that the request gave the model.
        vocabulary: the bytes of every token that is told of.
        prompts: for each answer, the prompt that it is to begin with; empty where none is.
    """

    prefix: ClassVar[str]
    kind: ClassVar[str]

    model: str
    vocabulary: Mapping[int, bytes]
    prompts: list[Tokenization] = field(default_factory=list)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[Response], asked: Generation) -> dict[str, Any]:
        """Return the answers to all prompts, in their order, as one object."""
        usage = Usage()
        choices = []
        for index, answer in enumerate(answers):
            usage.add(index // asked.n, index, answer)
            choices.append(self.choice(index, answer))
        return self.envelope(choices) | {"usage": usage.totals()}

    def envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what is around choices."""
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def choice(self, index: int, answer: Response) -> dict[str, Any]:
        """Return a whole answer."""
        raise NotImplementedError

    def chunks(self, index: int, piece: Response) -> list[dict[str, Any]]:
        """Return the chunks for a piece of an answer."""
        raise NotImplementedError

    def text_of(self, token_id: int) -> str:
        """Return a token as text."""
        return self.vocabulary[token_id].decode(errors="replace")


@dataclass
class CompletionShape(Shape):
    """Completions, whole or in chunks."""

    prefix = "cmpl"
    kind = "text_completion"

    offsets: dict[int, int] = field(default_factory=dict)
    """Of each answer that has begun, how much text its tokens have so far."""

    def choice(self, index: int, answer: Response) -> dict[str, Any]:
        """See Shape."""
        begins = bool(self.prompts) and index not in self.offsets
        prompt = self.prompts[index] if begins else None
        logprobs = self._logprobs(index, prompt, answer)
        return {
            "index": index,
            "text": (prompt.text if prompt else "") + answer.generated_text,
            "logprobs": logprobs if logprobs["tokens"] else None,
            "finish_reason": answer.finish_reason.value if answer.ended else None,
        }

    def chunks(self, index: int, piece: Response) -> list[dict[str, Any]]:
        """See Shape."""
        choice = self.choice(index, piece)
        return [self.envelope([choice])] if choice["text"] or choice["logprobs"] or piece.ended else []

    def _logprobs(self, index: int, prompt: Tokenization | None, answer: Response) -> dict[str, Any]:
        token_ids: list[int] = []
        logprobs: list[float | None] = []
        tops: list[TopLogprobs | None] = []
        if prompt and (answer.prompt_logprobs or answer.logprobs):
            token_ids += prompt.token_ids
            logprobs += [None, *answer.prompt_logprobs]  # before the first token there is nothing that foretells it
            tops += [None, *answer.prompt_top_logprobs] if answer.prompt_top_logprobs else [None] * len(token_ids)
        if answer.logprobs:
            token_ids += answer.token_ids
            logprobs += answer.logprobs
            tops += answer.top_logprobs or [None] * len(answer.token_ids)
        offset = self.offsets.get(index, 0)
        offsets = []
        for token_id in token_ids:
            offsets.append(offset)
            offset += len(self.text_of(token_id))
        self.offsets[index] = offset
        told = [_finite(logprob) for logprob in logprobs]
        return {
            "tokens": [self.text_of(token_id) for token_id in token_ids],
            "token_logprobs": told,
            "top_logprobs": [self._top(*each) for each in zip(token_ids, told, tops, strict=True)]
            if any(tops)
            else None,
            "text_offset": offsets,
        }

    def _top(self, token_id: int, logprob: float | None, top: TopLogprobs | None) -> dict[str, float] | None:
        """Return the most likely tokens at a place, and the one that is there; of equal texts, the likeliest."""
        if top is None or logprob is None:
            return None
        by_text: dict[str, float] = {}
        for each, value in (*top, (token_id, logprob)):
            by_text.setdefault(self.text_of(each), max(value, LEAST_LOGPROB))
        return by_text


@dataclass
class ChatShape(Shape):
    """Chat completions, whole or in chunks."""

    prefix = "chatcmpl"
    kind = "chat.completion"

    begun: set[int] = field(default_factory=set)

    def choice(self, index: int, answer: Response) -> dict[str, Any]:
        """See Shape."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": answer.generated_text, "refusal": None},
            "logprobs": self._logprobs(answer),
            "finish_reason": answer.finish_reason.value,
        }

    def chunks(self, index: int, piece: Response) -> list[dict[str, Any]]:
        """See Shape."""
        made = []
        if index not in self.begun:
            self.begun.add(index)
            made.append(self._chunk(index, {"role": "assistant", "content": ""}))
        logprobs = self._logprobs(piece)
        if piece.generated_text or logprobs:
            made.append(self._chunk(index, {"content": piece.generated_text}, logprobs))
        if piece.ended:
            made.append(self._chunk(index, {}, None, piece.finish_reason.value))
        return made

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: Any = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self.envelope([choice]) | {"object": "chat.completion.chunk"}

    def _logprobs(self, answer: Response) -> dict[str, Any] | None:
        if not answer.logprobs:
            return None
        tops = answer.top_logprobs or [()] * len(answer.logprobs)
        places = zip(answer.token_ids, answer.logprobs, tops, strict=True)
        content = [
            self._token(own, value) | {"top_logprobs": [self._token(*t) for t in top]} for own, value, top in places
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self.text_of(token_id),
            "logprob": _finite(logprob),
            "bytes": list(self.vocabulary[token_id]),
        }


class Usage:
    """Counts the tokens of the prompts and their answers."""

    def __init__(self) -> None:
        self._prompts: dict[int, int] = {}
        self._answers: dict[int, int] = {}

    def add(self, prompt: int, answer: int, piece: Response) -> None:
        """Take note of a piece of an answer; the last one of each counts."""
        self._prompts[prompt] = piece.prompt_length
        self._answers[answer] = piece.generated_length

    def totals(self) -> dict[str, int]:
        """Return the counts as OpenAI has them."""
        read, written = sum(self._prompts.values()), sum(self._answers.values())
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def what_is_told(asked: Generation, answer: Response) -> Response:
    """Return an answer; without its token, where a request wants none: an engine draws at least one."""
    if asked.max_tokens != 0:
        return answer
    return replace(
        answer,
        generated_text="",
        generated_length=0,
        token_ids=(),
        logprobs=(),
        top_logprobs=(),
        finish_reason=GenerationFinishReason.LENGTH,
    )


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST_LOGPROB)
