"""How one sequence chooses its tokens, and the face of what draws them for a batch."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from mii_hpc.config import GenerateParamsConfig
from mii_hpc.engine.answer import Scored
from mii_hpc.engine.guiding import Guide
from mii_hpc.engine.step import Step

NOT_FINITE = -1
"""Stands for a token where the model's numbers are not finite."""


class Sampler:
    """How one sequence chooses its tokens.

    A token takes exactly one number from the sequence's own random generator, so that the same seed gives
    the same text whatever else is in the batch.

    Attributes:
        tokens: prompt and answer as far as they are known; the sequence's own list, which grows.
        counts: whether it matters how often the answer has a token.
        adds: whether anything is added to the logits before all else.
        is_guided: whether `allowed` says which tokens may come.
        is_bounded: whether it, or `forbidden`, may leave some out.
    """

    def __init__(
        self,
        params: GenerateParamsConfig,
        tokens: Sequence[int],
        vocabulary: int,
        eos_token_ids: Sequence[int],
        index: int,
        guide: Guide | None = None,
    ) -> None:
        """Sample for the `index`-th answer to a prompt, among what its `guide` allows if it has one."""
        self.tokens = tokens
        self.greedy = params.greedy
        self.temperature = params.temperature or 1.0
        self.top_p = params.top_p
        self.top_k = min(params.top_k or vocabulary, vocabulary)
        self.penalty = params.repetition_penalty
        self.logprobs = params.logprobs
        self.top_logprobs = params.top_logprobs
        self.frequency_penalty = params.frequency_penalty
        self.presence_penalty = params.presence_penalty
        self.bias = {token_id: bias for token_id, bias in params.logit_bias.items() if token_id < vocabulary}
        self._vocabulary = vocabulary
        self._min_new_tokens = params.min_new_tokens
        self._masked = list(eos_token_ids)
        self._guide = guide
        self.counts = params.frequency_penalty != 0 or params.presence_penalty != 0
        self.adds = bool(self.bias) or self.counts
        self.is_guided = guide is not None
        self.is_bounded = self.is_guided or params.min_new_tokens > 0
        self._random = random.Random() if params.seed is None else random.Random(params.seed + index)
        self._generated = 0
        self._prompt_length = len(tokens)
        self._seen: torch.Tensor | None = None

    @property
    def forbidden(self) -> list[int]:
        """Tokens that may not come now: those that would end the answer before its minimum. Not of a guided one."""
        return self._masked if self._generated < self._min_new_tokens and not self.is_guided else []

    def allowed(self) -> np.ndarray:
        """Return which tokens [vocabulary] may come now, of a sequence that is guided."""
        assert self._guide is not None
        return self._guide.allowed(self._generated >= self._min_new_tokens)

    @property
    def is_plain(self) -> bool:
        """Whether the most likely token is the one to take, as the model gives it."""
        return self.greedy and self.penalty == 1.0 and not self.forbidden and not self.adds and not self.is_guided

    @property
    def answer(self) -> Sequence[int]:
        """The answer's tokens, as far as they are known."""
        return self.tokens[self._prompt_length :]

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


class Drawn(NamedTuple):
    """What a step has drawn.

    Attributes:
        token_ids: of each slice, NOT_FINITE where the model's numbers are not finite. That is told of a slice in the
            middle of a prompt, too, for which there is nothing to draw and any other number means nothing. So its
            blocks are found out before anybody else can have them, even where no token is ever drawn because of a
            cancellation.
        scores: by row, what was asked for: the token's log probability, and the most likely tokens.
    """

    token_ids: Sequence[int]
    scores: Mapping[int, Scored]


def scores_of(logits: torch.Tensor, token_ids: Sequence[int], count: int) -> list[Scored]:
    """Return the log probability of a token in each row of logits [rows, vocabulary], and the `count` most likely."""
    scores = logits.float()
    totals = scores.logsumexp(dim=-1, keepdim=True)
    chosen = torch.tensor(token_ids, device=logits.device)[:, None]
    own: list[float] = (scores.gather(-1, chosen) - totals).squeeze(-1).tolist()
    if not count:
        return [(value, ()) for value in own]
    top = scores.topk(min(count, scores.shape[-1]), dim=-1)
    ids, values = top.indices.tolist(), (top.values - totals).tolist()
    return [(value, tuple(zip(*each, strict=True))) for value, *each in zip(own, ids, values, strict=True)]


class Draw(Protocol):
    """Tokens that are being drawn."""

    def wait(self) -> Drawn:
        """Return them, once they are known."""


class SamplingBackend(Protocol):
    """Draws the tokens of a step.

    Attributes:
        lag: how many steps may be begun before the tokens of one are known here. Where it is not 0, the token that a
            sequence draws is put where the next step of its slot reads it.
    """

    lag: int

    def draw(self, logits: torch.Tensor, step: Step, samplers: Sequence[Sampler]) -> Draw:
        """Begin to draw from the logits [slices, vocabulary]; those of the slices that sample get a token."""
