"""The next token of every sequence in a batch, each by its own options."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mii_hpc.config import GenerateParamsConfig

# Most nuclei are small, so sorting the most likely tokens is enough; rows that need more are sorted whole.
CANDIDATES = 128


class Sampler:
    """How one sequence chooses its tokens.

    A token takes exactly one number from the sequence's own random generator, so that the same seed gives
    the same text whatever else is in the batch.
    """

    def __init__(
        self,
        params: GenerateParamsConfig,
        prompt: Sequence[int],
        vocabulary: int,
        eos_token_ids: Sequence[int],
        index: int,
    ) -> None:
        """Sample for the `index`-th answer to a prompt."""
        self.greedy = params.greedy
        self.temperature = params.temperature or 1.0
        self.top_p = params.top_p
        self.top_k = min(params.top_k or vocabulary, vocabulary)
        self.penalty = params.repetition_penalty
        self.logprobs = params.logprobs
        self._min_new_tokens = params.min_new_tokens
        self._masked = list(eos_token_ids)
        self._random = random.Random() if params.seed is None else random.Random(params.seed + index)
        self._generated = 0
        self.seen: torch.Tensor | None = None
        if self.penalty != 1.0:
            self.seen = torch.zeros(vocabulary, dtype=torch.bool)
            self.seen[list(prompt)] = True

    @property
    def forbidden(self) -> list[int]:
        """Tokens that may not come now: those that would end the answer before its minimum."""
        return self._masked if self._generated < self._min_new_tokens else []

    @property
    def is_plain(self) -> bool:
        """Whether the most likely token is the one to take, as the model gives it."""
        return self.greedy and self.seen is None and not self.forbidden

    def draw(self) -> float:
        """Return the number from [0, 1) that decides the next token."""
        return self._random.random()

    def note(self, token_id: int) -> None:
        """Remember a token that was chosen."""
        self._generated += 1
        if self.seen is not None:
            self.seen[token_id] = True


@dataclass(frozen=True)
class Choice:
    """A token; `logprob` is None unless asked for. No token means that the model gave numbers not finite."""

    token_id: int | None
    logprob: float | None = None


def choose(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[Choice]:
    """Return a choice for each row of `logits` [rows, vocabulary], and note it in its sampler."""
    logits = logits.float()
    highest, best = logits.max(dim=-1)
    # A NaN anywhere makes the maximum one.
    finite = [math.isfinite(value) for value in highest.tolist()]
    tokens: list[int] = best.tolist()
    if not all(sampler.is_plain for sampler in samplers):
        _choose_by_options(logits, samplers, finite, tokens)
    logprobs = _logprobs(logits, samplers, tokens)
    for sampler, token, is_finite in zip(samplers, tokens, finite, strict=True):
        if is_finite:
            sampler.note(token)
    return [
        Choice(token, logprob) if is_finite else Choice(None)
        for token, logprob, is_finite in zip(tokens, logprobs, finite, strict=True)
    ]


def _choose_by_options(
    logits: torch.Tensor, samplers: Sequence[Sampler], finite: list[bool], tokens: list[int]
) -> None:
    rows = [row for row, s in enumerate(samplers) if finite[row] and not s.is_plain]
    chosen = [samplers[row] for row in rows]
    if not rows:
        return
    scores = logits[rows]
    _penalise(scores, chosen)
    for place, sampler in enumerate(chosen):
        if sampler.forbidden:
            scores[place, sampler.forbidden] = -torch.inf
    greedy = [place for place, sampler in enumerate(chosen) if sampler.greedy]
    for place, token in zip(greedy, scores[greedy].argmax(dim=-1).tolist(), strict=True):
        tokens[rows[place]] = token
    drawn = [place for place, sampler in enumerate(chosen) if not sampler.greedy]
    if drawn:
        picks = _draw(scores[drawn], [chosen[place] for place in drawn])
        for place, token in zip(drawn, picks, strict=True):
            tokens[rows[place]] = token


def _penalise(scores: torch.Tensor, samplers: Sequence[Sampler]) -> None:
    for row, sampler in zip(scores, samplers, strict=True):
        if sampler.seen is not None:
            seen = sampler.seen.to(row.device)
            row.copy_(torch.where(seen, torch.where(row < 0, row * sampler.penalty, row / sampler.penalty), row))


def _draw(scores: torch.Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """Draw a token for each row by the inverse of its cumulative distribution."""
    vocabulary = scores.shape[-1]
    scores = scores / _column([s.temperature for s in samplers], scores)
    uniform = torch.tensor([s.draw() for s in samplers], dtype=scores.dtype)[:, None]
    tokens = [0] * len(samplers)
    # Which way a row goes depends on the row alone, so that its company cannot change its token.
    unbounded = [row for row, s in enumerate(samplers) if s.top_p >= 1 and s.top_k >= vocabulary]
    if unbounded:
        mass = scores[unbounded].softmax(dim=-1)
        for row, token in zip(unbounded, _invert(mass, uniform[unbounded]), strict=True):
            tokens[row] = token
    bounded = [row for row, s in enumerate(samplers) if s.top_p < 1 or s.top_k < vocabulary]
    narrow = [row for row in bounded if samplers[row].top_k <= CANDIDATES or samplers[row].top_p < 1]
    wide = [row for row in bounded if row not in set(narrow)]
    if narrow:
        wide += _draw_from_top(scores, uniform, samplers, narrow, min(CANDIDATES, vocabulary), tokens)
    if wide:
        _draw_from_top(scores, uniform, samplers, wide, vocabulary, tokens)
    return tokens


def _draw_from_top(
    scores: torch.Tensor,
    uniform: torch.Tensor,
    samplers: Sequence[Sampler],
    rows: list[int],
    count: int,
    tokens: list[int],
) -> list[int]:
    """Draw for `rows` from their `count` most likely tokens; return the rows for which these are too few."""
    vocabulary = scores.shape[-1]
    scores = scores[rows]
    values, ids = scores.topk(count, dim=-1)
    if count < vocabulary:
        # What follows is so little that a GPU would take longer to launch it than the CPU takes to do it.
        values, ids = values.cpu(), ids.cpu()
    top_k = _column([samplers[row].top_k for row in rows], values)
    top_p = _column([samplers[row].top_p for row in rows], values)
    outside = torch.arange(count, device=values.device) >= top_k
    values = values.masked_fill(outside, -torch.inf)
    total = values.logsumexp(dim=-1, keepdim=True)
    every = [place for place, row in enumerate(rows) if samplers[row].top_k >= vocabulary]
    if count < vocabulary and every:
        total[every] = scores[every].logsumexp(dim=-1, keepdim=True).cpu()
    mass = (values - total).exp()
    before = mass.cumsum(dim=-1) - mass
    inside = before < top_p
    picks = torch.tensor(_invert(mass * inside, uniform[rows]), device=values.device)
    picked = ids.gather(-1, picks[:, None]).squeeze(-1).tolist()
    too_few: list[int] = []
    if count < vocabulary:
        short = (before[:, -1] + mass[:, -1] < top_p.squeeze(-1)).tolist()
        too_few = [
            row
            for row, is_short in zip(rows, short, strict=True)
            if samplers[row].top_k > count and (is_short or samplers[row].top_k < vocabulary)
        ]
    for row, token in zip(rows, picked, strict=True):
        tokens[row] = token
    return too_few


def _invert(mass: torch.Tensor, uniform: torch.Tensor) -> list[int]:
    """Return for each row the first place where the cumulative mass exceeds `uniform` of its total."""
    cumulative = mass.cumsum(dim=-1)
    target = uniform.to(mass.device) * cumulative[:, -1:]
    places = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    # Rounding can put the target at the very end, beyond the last token that has any mass.
    last = (mass > 0).long().mul(torch.arange(mass.shape[-1], device=mass.device)).amax(dim=-1)
    result: list[int] = torch.minimum(places, last).tolist()
    return result


def _logprobs(logits: torch.Tensor, samplers: Sequence[Sampler], tokens: Sequence[int]) -> list[float | None]:
    result: list[float | None] = [None] * len(samplers)
    rows = [row for row, sampler in enumerate(samplers) if sampler.logprobs]
    if rows:
        chosen = logits[rows]
        ids = torch.tensor([[tokens[row]] for row in rows], device=logits.device)
        values = chosen.gather(-1, ids).squeeze(-1) - chosen.logsumexp(dim=-1)
        for row, value in zip(rows, values.tolist(), strict=True):
            result[row] = value
    return result


def _column(numbers: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(numbers, dtype=like.dtype, device=like.device)[:, None]
