"""What the leader of a replica counts and times of its requests."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

from mii_hpc.generation import LATENCY_BOUNDS, TOKEN_BOUNDS, Load, Observed, Response


class Recorder:
    """Counts and times requests. Belongs to one event loop."""

    def __init__(self) -> None:
        self._prompt_tokens = 0
        self._finished: Counter[str] = Counter()
        self._first_token = Observed(LATENCY_BOUNDS)
        self._between_tokens = Observed(TOKEN_BOUNDS)
        self._whole = Observed(LATENCY_BOUNDS)

    def request(self) -> Recording:
        """Return what records a request that arrives now."""
        return Recording(self)

    def added_to(self, load: Load) -> Load:
        """Return an engine's load with what was counted and timed."""
        return replace(
            load,
            prompt_tokens=self._prompt_tokens,
            finished=dict(self._finished),
            time_to_first_token=self._first_token.histogram,
            inter_token_latency=self._between_tokens.histogram,
            request_latency=self._whole.histogram,
        )

    def began(self, piece: Response, seconds: float) -> None:
        """Count an answer's first piece."""
        if piece.index == 0:
            self._prompt_tokens += piece.prompt_length
        if not piece.ended:  # else it is the whole answer, and does not tell when its first token was made
            self._first_token.add(seconds)

    def ended(self, piece: Response, seconds: float, since_first: float) -> None:
        """Count an answer that is complete."""
        self._finished[piece.finish_reason.value] += 1
        self._whole.add(seconds)
        if since_first and piece.generated_length > 1:
            self._between_tokens.add(since_first / (piece.generated_length - 1), piece.generated_length - 1)


class Recording:
    """Records one request."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._arrived = time.monotonic()
        self._first: dict[int, float] = {}

    def piece(self, piece: Response) -> None:
        """Take note of a piece of an answer."""
        is_first = piece.index not in self._first
        if not is_first and not piece.ended:
            return
        now = time.monotonic()
        if is_first:
            self._first[piece.index] = now
            self._recorder.began(piece, now - self._arrived)
        if piece.ended:
            self._recorder.ended(piece, now - self._arrived, now - self._first[piece.index])
