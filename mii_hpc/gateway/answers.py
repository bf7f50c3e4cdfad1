"""How answers are written: the objects of OpenAI's API, whole and in the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mii_hpc.gateway.schema import Generation
from mii_hpc.generation import Response as Answer


@dataclass
class Shape:
    """How answers are written: an id for them all, and what each begins with."""

    prefix: ClassVar[str]
    kind: ClassVar[str]

    model: str
    before: list[str] = field(default_factory=list)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[Answer], asked: Generation, vocabulary: Mapping[int, bytes]) -> dict[str, Any]:
        """Return the answers to all prompts, in their order, as one object."""
        usage = Usage()
        choices = []
        for index, answer in enumerate(answers):
            usage.add(index // asked.n, index, answer)
            choices.append(self.choice(index, answer, asked, vocabulary))
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

    def choice(self, index: int, answer: Answer, asked: Generation, vocabulary: Mapping[int, bytes]) -> dict[str, Any]:
        """Return a whole answer."""
        raise NotImplementedError

    def chunks(
        self, index: int, piece: Answer, asked: Generation, vocabulary: Mapping[int, bytes]
    ) -> list[dict[str, Any]]:
        """Return the chunks for a piece of an answer."""
        raise NotImplementedError


@dataclass
class CompletionShape(Shape):
    """Completions, whole or in chunks."""

    prefix = "cmpl"
    kind = "text_completion"

    offsets: dict[int, int] = field(default_factory=dict)

    def choice(self, index: int, answer: Answer, asked: Generation, vocabulary: Mapping[int, bytes]) -> dict[str, Any]:
        """See Shape."""
        before = self.before[index]
        self.before[index] = ""
        return {
            "index": index,
            "text": before + answer.generated_text,
            "logprobs": self._logprobs(index, len(before), answer, vocabulary) if answer.logprobs else None,
            "finish_reason": answer.finish_reason.value if answer.ended else None,
        }

    def chunks(
        self, index: int, piece: Answer, asked: Generation, vocabulary: Mapping[int, bytes]
    ) -> list[dict[str, Any]]:
        """See Shape."""
        choice = self.choice(index, piece, asked, vocabulary)
        return [self.envelope([choice])] if choice["text"] or choice["logprobs"] or piece.ended else []

    def _logprobs(self, index: int, before: int, answer: Answer, vocabulary: Mapping[int, bytes]) -> dict[str, Any]:
        offset = self.offsets.get(index, 0) + before
        tokens, offsets = [], []
        for token_id in answer.token_ids:
            tokens.append(_text(vocabulary, token_id))
            offsets.append(offset)
            offset += len(tokens[-1])
        self.offsets[index] = offset
        return {
            "tokens": tokens,
            "token_logprobs": list(answer.logprobs),
            "top_logprobs": None,
            "text_offset": offsets,
        }


@dataclass
class ChatShape(Shape):
    """Chat completions, whole or in chunks."""

    prefix = "chatcmpl"
    kind = "chat.completion"

    begun: set[int] = field(default_factory=set)

    def choice(self, index: int, answer: Answer, asked: Generation, vocabulary: Mapping[int, bytes]) -> dict[str, Any]:
        """See Shape."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": answer.generated_text, "refusal": None},
            "logprobs": _chat_logprobs(answer, vocabulary),
            "finish_reason": answer.finish_reason.value,
        }

    def chunks(
        self, index: int, piece: Answer, asked: Generation, vocabulary: Mapping[int, bytes]
    ) -> list[dict[str, Any]]:
        """See Shape."""
        made = []
        if index not in self.begun:
            self.begun.add(index)
            made.append(self._chunk(index, {"role": "assistant", "content": ""}))
        logprobs = _chat_logprobs(piece, vocabulary)
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


def _chat_logprobs(answer: Answer, vocabulary: Mapping[int, bytes]) -> dict[str, Any] | None:
    if not answer.logprobs:
        return None
    return {
        "content": [
            _chat_token(vocabulary, token_id, logprob) | {"top_logprobs": []}
            for token_id, logprob in zip(answer.token_ids, answer.logprobs, strict=True)
        ],
        "refusal": None,
    }


def _chat_token(vocabulary: Mapping[int, bytes], token_id: int, logprob: float) -> dict[str, Any]:
    return {"token": _text(vocabulary, token_id), "logprob": logprob, "bytes": list(vocabulary[token_id])}


def _text(vocabulary: Mapping[int, bytes], token_id: int) -> str:
    return vocabulary[token_id].decode(errors="replace")


class Usage:
    """Counts the tokens of the prompts and their answers."""

    def __init__(self) -> None:
        self._prompts: dict[int, int] = {}
        self._answers: dict[int, int] = {}

    def add(self, prompt: int, answer: int, piece: Answer) -> None:
        """Take note of a piece of an answer; the last one of each counts."""
        self._prompts[prompt] = piece.prompt_length
        self._answers[answer] = piece.generated_length

    def totals(self) -> dict[str, int]:
        """Return the counts as OpenAI has them."""
        read, written = sum(self._prompts.values()), sum(self._answers.values())
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
