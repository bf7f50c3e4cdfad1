"""Draws tokens with torch, and has them at once: works everywhere."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mii_hpc.engine.answer import Scored
from mii_hpc.engine.sampling.base import NOT_FINITE, Draw, Drawn, Sampler, scores_of
from mii_hpc.engine.step import Step

# Most nuclei are small, so sorting the most likely tokens is enough; rows that need more are sorted whole.
CANDIDATES = 128


class HostSampling:
    """See SamplingBackend."""

    lag = 0

    def __init__(self, drawn: torch.Tensor) -> None:
        """Draw on any device; the tokens `drawn` are not kept there, for the next step is told them."""

    def draw(self, logits: torch.Tensor, step: Step, samplers: Sequence[Sampler]) -> Draw:
        """Draw, and return what is done already."""
        if step.sample.all():
            return _Known(choose(logits, samplers))
        token_ids = [0 if is_finite else NOT_FINITE for is_finite in logits.amax(dim=-1).isfinite().tolist()]
        scores = {}
        rows = np.flatnonzero(step.sample).tolist()
        if rows:
            drawn = choose(logits[rows], [samplers[row] for row in rows])
            for row, token_id in zip(rows, drawn.token_ids, strict=True):
                token_ids[row] = token_id
            scores = {rows[place]: scored for place, scored in drawn.scores.items()}
        return _Known(Drawn(token_ids, scores))


@dataclass(frozen=True)
class _Known:
    drawn: Drawn

    def wait(self) -> Drawn:
        """Return it."""
        return self.drawn


def choose(logits: torch.Tensor, samplers: Sequence[Sampler]) -> Drawn:
    """Draw a token for each row of `logits` [rows, vocabulary], and note it in its sampler."""
    logits = logits.float()
    highest, best = logits.max(dim=-1)
    # A NaN anywhere makes the maximum one.
    finite = [math.isfinite(value) for value in highest.tolist()]
    tokens: list[int] = best.tolist()
    if not all(sampler.is_plain for sampler in samplers):
        _choose_by_options(logits, samplers, finite, tokens)
    scores = _scores(logits, samplers, tokens)
    for row, (sampler, is_finite) in enumerate(zip(samplers, finite, strict=True)):
        sampler.advance()
        if is_finite:
            sampler.note(tokens[row])
        else:
            tokens[row] = NOT_FINITE
    return Drawn(tokens, scores)


def _choose_by_options(
    logits: torch.Tensor, samplers: Sequence[Sampler], finite: list[bool], tokens: list[int]
) -> None:
    rows = [row for row, s in enumerate(samplers) if finite[row] and not s.is_plain]
    chosen = [samplers[row] for row in rows]
    if not rows:
        return
    scores = logits[rows]
    _add(scores, chosen)
    _penalise(scores, chosen)
    for place, sampler in enumerate(chosen):
        if sampler.forbidden:
            scores[place, sampler.forbidden] = -torch.inf
        if sampler.is_guided:
            scores[place].masked_fill_(torch.from_numpy(~sampler.allowed()).to(scores.device), -torch.inf)
    greedy = [place for place, sampler in enumerate(chosen) if sampler.greedy]
    for place, token in zip(greedy, scores[greedy].argmax(dim=-1).tolist(), strict=True):
        tokens[rows[place]] = token
    drawn = [place for place, sampler in enumerate(chosen) if not sampler.greedy]
    if drawn:
        picks = _draw(scores[drawn], [chosen[place] for place in drawn])
        for place, token in zip(drawn, picks, strict=True):
            tokens[rows[place]] = token


def _add(scores: torch.Tensor, samplers: Sequence[Sampler]) -> None:
    for row, sampler in zip(scores, samplers, strict=True):
        added = defaultdict(float, sampler.bias)
        if sampler.counts:
            for token, count in Counter(sampler.answer).items():
                added[token] -= sampler.frequency_penalty * count + sampler.presence_penalty
        if added:
            row[list(added)] += torch.tensor(list(added.values()), dtype=row.dtype, device=row.device)


def _penalise(scores: torch.Tensor, samplers: Sequence[Sampler]) -> None:
    for row, sampler in zip(scores, samplers, strict=True):
        if sampler.penalty != 1.0:
            seen = sampler.seen.to(row.device)
            row.copy_(torch.where(seen, torch.where(row < 0, row * sampler.penalty, row / sampler.penalty), row))


def _draw(scores: torch.Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """Draw a token for each row by the inverse of its cumulative distribution over the token ids."""
    vocabulary = scores.shape[-1]
    scores = scores / _column([s.temperature for s in samplers], scores)
    uniform = torch.tensor([s.draw() for s in samplers], dtype=scores.dtype)[:, None]
    # Which way a row goes depends on the row alone, so that its company cannot change its token.
    bounded = [row for row, s in enumerate(samplers) if s.top_p < 1 or s.top_k < vocabulary]
    if bounded:
        floors = _floors(scores[bounded], [samplers[row] for row in bounded])
        scores[bounded] = scores[bounded].masked_fill(scores[bounded] < floors, -torch.inf)
    return _invert(scores.softmax(dim=-1), uniform)


def _floors(scores: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    """Return the smallest score [rows, 1] that top_k and top_p leave. Tokens with equal scores stay or go together."""
    vocabulary = scores.shape[-1]
    few = min(CANDIDATES, vocabulary)
    floors, found = _floors_among(scores, samplers, few)
    wide = [row for row, is_found in enumerate(found) if not is_found]
    if wide:
        floors[wide], _ = _floors_among(scores[wide], [samplers[row] for row in wide], vocabulary)
    return floors


def _floors_among(scores: torch.Tensor, samplers: Sequence[Sampler], count: int) -> tuple[torch.Tensor, list[bool]]:
    """Look for each row's floor among its `count` largest scores; return it, and whether it is sure to be there."""
    vocabulary = scores.shape[-1]
    values = scores.topk(count, dim=-1).values
    top_k = torch.tensor([sampler.top_k for sampler in samplers], device=scores.device)[:, None]
    top_p = _column([sampler.top_p for sampler in samplers], scores)
    every = top_k >= vocabulary
    kth = values.gather(-1, top_k.clamp(max=count) - 1).masked_fill(every, -torch.inf)
    # Those that equal the last one may go on behind it.
    sure = every | (values[:, -1:] < kth) | (count == vocabulary)
    total = torch.where(every, scores, scores.masked_fill(scores < kth, -torch.inf)).logsumexp(dim=-1, keepdim=True)
    reached = (values - total).exp().cumsum(dim=-1) >= top_p
    nucleus = values.gather(-1, reached.long().argmax(dim=-1, keepdim=True))
    is_reached = reached[:, -1:]
    sure = sure & (is_reached | (top_p >= 1) | (count == vocabulary))
    floors = torch.where(is_reached & (top_p < 1), torch.maximum(nucleus, kth), kth)
    return floors, sure.squeeze(-1).tolist()


def _invert(mass: torch.Tensor, uniform: torch.Tensor) -> list[int]:
    """Return for each row the first place where the cumulative mass exceeds `uniform` of its total."""
    cumulative = mass.cumsum(dim=-1)
    target = uniform.to(mass.device) * cumulative[:, -1:]
    places = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    # Rounding can put the target at the very end, beyond the last token that has any mass.
    last = (mass > 0).long().mul(torch.arange(mass.shape[-1], device=mass.device)).amax(dim=-1)
    result: list[int] = torch.minimum(places, last).tolist()
    return result


def _scores(logits: torch.Tensor, samplers: Sequence[Sampler], tokens: Sequence[int]) -> dict[int, Scored]:
    rows = [row for row, sampler in enumerate(samplers) if sampler.logprobs]
    if not rows:
        return {}
    count = max(samplers[row].top_logprobs for row in rows)
    scored = zip(rows, scores_of(logits[rows], [tokens[row] for row in rows], count), strict=True)
    return {row: (own, top[: samplers[row].top_logprobs]) for row, (own, top) in scored}


def _column(numbers: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(numbers, dtype=like.dtype, device=like.device)[:, None]
