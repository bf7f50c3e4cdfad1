"""One answer in the making: its text, its lengths, and why it ends. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

from mii_hpc.config import GenerateParamsConfig
from mii_hpc.constants import GenerationFinishReason
from mii_hpc.engine.text import StopStrings, TextSource
from mii_hpc.errors import InvalidRequestError
from mii_hpc.generation import Prompt, Response, ResumedAnswer, TopLogprobs

if TYPE_CHECKING:
    from mii_hpc.engine.guiding import Guide

REPORT_SECONDS = 0.2
"""How often an answer that is no stream, but reports, tells what there is of it."""

Scored = tuple[float, TopLogprobs]
"""A token's log probability, and the most likely tokens in its place."""


class Answer:
    """Collects the tokens of one sequence and gives the pieces to send.

    Attributes:
        generated: tokens so far, the end-of-sequence token included.
        finish_reason: NONE while the answer goes on.
        ended: whether it is complete.
    """

    def __init__(
        self,
        params: GenerateParamsConfig,
        source: TextSource,
        *,
        prompt: Prompt,
        prompt_length: int,
        limit: int,
        index: int = 0,
        limit_reason: GenerationFinishReason = GenerationFinishReason.LENGTH,
        guide: Guide | None = None,
        reports: bool = False,
    ) -> None:
        """Expect at most `limit` tokens; an answer that long ends with `limit_reason`.

        With a `guide`, the answer ends as soon as nothing can follow. See GenerationRequest for `reports`.
        """
        self.generated = 0
        self.finish_reason = GenerationFinishReason.NONE
        self.ended = False
        self._params = params
        self._is_stream, self._reports = params.stream, reports
        self._period: int | None = None
        """Of the latest report."""
        self._source = source
        self._guide = guide
        self._stop = StopStrings(params.stop) if params.stop else None
        self._prompt_length = prompt_length
        self._limit = limit
        self._limit_reason = limit_reason
        self._index = index
        self._text = prompt if params.return_full_text and isinstance(prompt, str) else ""
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._top_logprobs: list[TopLogprobs] = []
        self._of_prompt: Sequence[Scored] = ()

    def tell_of_prompt(self, scores: Sequence[Scored]) -> None:
        """Let the next piece tell of the prompt's tokens, but the first."""
        self._of_prompt = scores

    def add(
        self, token_id: int, logprob: float | None = None, ends: bool = False, top: TopLogprobs = (), period: int = 0
    ) -> Response | None:
        """Take the next token; `ends` marks the end-of-sequence token, which has no text.

        Returns what is to be sent now: a piece for every token of a stream, else one when the answer ends, and before
        one in each `period` if it reports. Raises InvalidRequestError for a token that the guide does not have there.
        """
        self._grow(token_id, logprob, ends, top)
        if self._is_stream or self.ended:
            return self._take()
        if self._reports and period != self._period:
            self._period = period
            return self._take()
        return None

    def resume(self, answer: ResumedAnswer, ends_with: Container[int] = ()) -> None:
        """Go on behind what has been delivered of this answer, as if all its tokens had been added here.

        Raises InvalidRequestError when the answer ends with one of them, or its guide does not have them.
        """
        for token_id in answer.token_ids:
            self._grow(token_id, None, token_id in ends_with)
            if self.ended:
                raise InvalidRequestError(f"resume: answer {self._index} has ended with its token {self.generated}")
        self._text = self._text[answer.characters :]
        self._token_ids.clear()

    def _grow(self, token_id: int, logprob: float | None, ends: bool, top: TopLogprobs = ()) -> None:
        self.generated += 1
        self._token_ids.append(token_id)
        if logprob is not None:
            self._logprobs.append(logprob)
            if self._params.top_logprobs:
                self._top_logprobs.append(top)
        if not ends:
            text = self._source.push(token_id)
            self._text += text if self._stop is None else self._certain(text)
            ends = self._guide is not None and self._guide.advance(token_id)
        if not self.ended and (ends or self.generated >= self._limit):
            text = self._source.flush()
            if self._stop is not None:
                text = self._certain(text)
                text += "" if self.ended else self._stop.flush()
            self._text += text
            if not self.ended:
                self._end(GenerationFinishReason.STOP if ends else self._limit_reason)

    def _certain(self, text: str) -> str:
        """Return what of a text, and of what was held back, begins no stop string; end the answer at a whole one."""
        assert self._stop is not None
        certain, stopped = self._stop.push(text, may_stop=self.generated >= self._params.min_new_tokens)
        if stopped:
            self._end(GenerationFinishReason.STOP)
        return certain

    def _end(self, reason: GenerationFinishReason) -> None:
        self.finish_reason = reason
        self.ended = True

    def _take(self) -> Response:
        # One is made for every token: names of arguments take it half as long again, and so does what is seldom there.
        piece = Response(self._text, self._prompt_length, self.generated, self.finish_reason, tuple(self._token_ids))
        if self._index:
            piece.index = self._index
        if self._logprobs:
            piece.logprobs, piece.top_logprobs = tuple(self._logprobs), tuple(self._top_logprobs)
            self._logprobs.clear()
            self._top_logprobs.clear()
        if self._of_prompt:
            piece.prompt_logprobs = tuple(logprob for logprob, _ in self._of_prompt)
            if self._params.top_logprobs:
                piece.prompt_top_logprobs = tuple(top for _, top in self._of_prompt)
            self._of_prompt = ()
        self._text = ""
        self._token_ids.clear()
        return piece


def report_period() -> int:
    """Return which period of REPORT_SECONDS it is, for Answer.add: all that report do so in the same step of each."""
    return int(time.monotonic() / REPORT_SECONDS)


def answer_limit(params: GenerateParamsConfig, prompt_length: int, context: int) -> int:
    """Return how many tokens the answer may have at most, when prompt plus answer may have `context`.

    A bound of the request's that reaches beyond is cut. Raises InvalidRequestError when the prompt leaves no room.
    """
    bound = min(params.max_length or context, context)
    if prompt_length >= bound:
        what = "max_length" if bound == params.max_length else "bound on prompt plus answer"
        raise InvalidRequestError(f"the prompt has {prompt_length} tokens, the {what} is {bound}")
    room = bound - prompt_length
    return room if params.max_new_tokens is None else min(room, params.max_new_tokens)
