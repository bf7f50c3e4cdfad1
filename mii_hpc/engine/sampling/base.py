"""How one sequence chooses its tokens, and the face of what draws them for a batch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from mii_hpc.config import GenerateParamsConfig
from mii_hpc.engine.step import Step


class Sampler:
    """How one sequence chooses its tokens.

    A token takes exactly one number from the sequence's own random generator, so that the same seed gives
    the same text whatever else is in the batch.

    Attributes:
        tokens: prompt and answer as far as they are known; the sequence's own list, which grows.
    """

    def __init__(
        self,
        params: GenerateParamsConfig,
        tokens: Sequence[int],
        vocabulary: int,
        eos_token_ids: Sequence[int],
        index: int,
    ) -> None:
        """Sample for the `index`-th answer to a prompt."""
        self.tokens = tokens
        self.greedy = params.greedy
        self.temperature = params.temperature or 1.0
        self.top_p = params.top_p
        self.top_k = min(params.top_k or vocabulary, vocabulary)
        self.penalty = params.repetition_penalty
        self.logprobs = params.logprobs
        self._vocabulary = vocabulary
        self._min_new_tokens = params.min_new_tokens
        self._masked = list(eos_token_ids)
        self._random = random.Random() if params.seed is None else random.Random(params.seed + index)
        self._generated = 0
        self._seen: torch.Tensor | None = None

    @property
    def forbidden(self) -> list[int]:
        """Tokens that may not come now: those that would end the answer before its minimum."""
        return self._masked if self._generated < self._min_new_tokens else []

    @property
    def is_plain(self) -> bool:
        """Whether the most likely token is the one to take, as the model gives it."""
        return self.greedy and self.penalty == 1.0 and not self.forbidden

    @property
    def seen(self) -> torch.Tensor:
        """Which tokens [vocabulary] the penalty is for."""
        if self._seen is None:
            self._seen = torch.zeros(self._vocabulary, dtype=torch.bool)
            self._seen[list(self.tokens)] = True
        return self._seen

    def draw(self) -> float:
        """Return the number from [0, 1) that decides the next token."""
        return self._random.random()

    def skip(self, count: int) -> None:
        """Go on as if that many tokens had been drawn."""
        self._generated += count
        if not self.greedy:
            for _ in range(count):
                self.draw()

    def advance(self) -> None:
        """Count a token, whose choice has begun."""
        self._generated += 1

    def note(self, token_id: int) -> None:
        """Remember a token that was chosen."""
        if self._seen is not None:
            self._seen[token_id] = True


@dataclass(frozen=True)
class Choice:
    """A token; `logprob` is None unless asked for. No token means that the model gave numbers not finite."""

    token_id: int | None
    logprob: float | None = None


class Draw(Protocol):
    """Tokens that are being drawn."""

    def wait(self) -> list[Choice | None]:
        """Return a choice for each slice of the step, None where there was nothing to draw.

        A slice in the middle of a prompt whose numbers are not finite has a choice without a token, too. So its blocks
        are found out before anybody else can have them, even where no token is ever drawn because of a cancellation.
        """


class SamplingBackend(Protocol):
    """Draws the tokens of a step.

    Attributes:
        lag: how many steps may be begun before the tokens of one are known here. Where it is not 0, the token that a
            sequence draws is put where the next step of its slot reads it.
    """

    lag: int

    def draw(self, logits: torch.Tensor, step: Step, samplers: Sequence[Sampler]) -> Draw:
        """Begin to draw from the logits [slices, vocabulary]; those of the slices that sample get a token."""
