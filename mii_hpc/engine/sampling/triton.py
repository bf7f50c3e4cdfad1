"""Draws tokens on the GPU: a kernel in Triton, for every option of a request, so that no step waits for the host.

A program takes one row of logits. Neither top_k nor top_p sorts: both look for the smallest score that they leave, by
halving the range of the scores' bits, as a radix select does. Tokens with equal scores stay or go together.

Triton's interpreter runs the same kernel on CPU, for tests (TRITON_INTERPRET=1 before this module is imported).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from mii_hpc.engine.answer import Scored
from mii_hpc.engine.sampling.base import Draw, Drawn, Sampler
from mii_hpc.engine.step import Step
from mii_hpc.engine.upload import upload

LOG2_E = tl.constexpr(1.4426950408889634)
# What a row's flags mean.
SAMPLED, GREEDY, ENDLESS, PENALISED, TOP_K, TOP_P = (tl.constexpr(1 << bit) for bit in range(6))
# A range of scores is halved once it is sure to hold the one that is looked for; at first it is an eighth of a binade.
FIRST_RANGE = tl.constexpr(1 << 20)

PARAMETERS = 7
"""Numbers of each row: slot, flags, top_k, temperature, top_p, penalty, and the one that decides."""


class TritonSampling:
    """See SamplingBackend."""

    lag = 1

    def __init__(self, drawn: torch.Tensor, vocabulary: int, eos_token_ids: Sequence[int]) -> None:
        """Draw for the slots of `drawn` [slots], the tokens that are drawn last."""
        self._drawn = drawn
        self._eos_token_ids = frozenset(eos_token_ids)
        self._ends = torch.tensor(list(eos_token_ids) or [-1], dtype=torch.int32, device=drawn.device)
        self._vocabulary = vocabulary
        self._parameters = np.zeros((len(drawn), PARAMETERS), dtype=np.int32)  # of each slot's sequence
        self._seen: torch.Tensor | None = None  # [slots, vocabulary], once a penalty is asked for
        self._counts: torch.Tensor | None = None  # the same, once it matters how often an answer has a token

    def draw(self, logits: torch.Tensor, step: Step, samplers: Sequence[Sampler]) -> Draw:
        """Launch the kernel behind what computes the logits."""
        for row in np.flatnonzero(step.fresh).tolist():
            self._begin(int(step.slots[row]), samplers[row])
        numbers = self._parameters[step.slots]
        floats = numbers.view(np.float32)
        numbers[~step.sample, 1] = 0
        sampled = np.flatnonzero(step.sample).tolist()
        if drawing := [row for row in sampled if not samplers[row].greedy]:
            floats[drawing, 6] = [samplers[row].draw() for row in drawing]
        forbidden: dict[int, np.ndarray] = {}  # beside those that end every answer, which the kernel knows
        for row in [row for row in sampled if samplers[row].is_bounded]:
            if samplers[row].is_guided:
                forbidden[row] = ~samplers[row].allowed()
            elif ends := samplers[row].forbidden:
                numbers[row, 1] |= ENDLESS.value
                if own := [token_id for token_id in ends if token_id not in self._eos_token_ids]:
                    forbidden[row] = np.array(own, dtype=np.int64)
        for row in sampled:
            samplers[row].advance()
        adding = [row for row in sampled if samplers[row].adds or row in forbidden]
        scores = self._added(logits, adding, step, samplers, forbidden) if adding else logits
        results = self._launch(scores, upload(numbers, logits.device))
        self._count([int(step.slots[row]) for row in adding if samplers[row].counts])
        # The kernel tells of the scores that it was given, and of no other token.
        told = [row for row in sampled if samplers[row].logprobs and (samplers[row].top_logprobs or row in adding)]
        return _Drawing(results, samplers, told, _scores_of(logits, results, told, samplers) if told else None)

    def _begin(self, slot: int, sampler: Sampler) -> None:
        """Take note of what stays the same for a slot's new sequence."""
        flags = SAMPLED.value
        if sampler.penalty != 1.0:
            flags |= PENALISED.value
            self._remember(slot, sampler.tokens)
        if sampler.counts:
            self._recount(slot, sampler.answer)
        if sampler.greedy:
            flags |= GREEDY.value
        if sampler.top_k < self._vocabulary:
            flags |= TOP_K.value
        if sampler.top_p < 1:
            flags |= TOP_P.value
        numbers = self._parameters[slot]
        numbers[:3] = slot, flags, sampler.top_k
        numbers.view(np.float32)[3:6] = LOG2_E.value / sampler.temperature, sampler.top_p, sampler.penalty

    def _added(
        self,
        logits: torch.Tensor,
        rows: Sequence[int],
        step: Step,
        samplers: Sequence[Sampler],
        forbidden: Mapping[int, np.ndarray],
    ) -> torch.Tensor:
        """Return the logits with what some rows' options add, and without the tokens that are forbidden in them."""
        scores = logits.float()  # a copy, unless they are that already
        scores = scores.clone() if scores is logits else scores
        for row in rows:
            sampler = samplers[row]
            if sampler.bias:
                ids = upload(np.array(list(sampler.bias), dtype=np.int64), logits.device)
                scores[row, ids] += upload(np.array(list(sampler.bias.values()), dtype=np.float32), logits.device)
            if sampler.counts:
                assert self._counts is not None, "counted since the slice that was fresh"
                counts = self._counts[int(step.slots[row])]
                scores[row] -= counts * sampler.frequency_penalty + (counts > 0) * sampler.presence_penalty
            if row in forbidden:
                scores[row, upload(forbidden[row], logits.device)] = -torch.inf
        return scores

    def _recount(self, slot: int, answer: Sequence[int]) -> None:
        """Count the tokens of the answer in a slot's new sequence; those that are drawn are added."""
        if self._counts is None:
            shape = (len(self._drawn), self._vocabulary)
            self._counts = torch.zeros(shape, dtype=torch.int16, device=self._drawn.device)
        row = self._counts[slot]
        row.zero_()
        ids, counts = np.unique(np.array(answer, dtype=np.int64), return_counts=True)
        row[upload(ids, row.device)] = upload(counts.astype(np.int16), row.device)

    def _count(self, slots: Sequence[int]) -> None:
        """Count the tokens that were just drawn in some slots."""
        if self._counts is not None and slots:
            rows = upload(np.array(slots, dtype=np.int64), self._drawn.device)
            self._counts[rows, self._drawn[rows]] += 1

    def _launch(self, logits: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
        """Return a token, or NOT_FINITE, and the bits of its log probability, for each row."""
        rows, vocabulary = logits.shape
        results = torch.empty(2, rows, dtype=torch.int32, device=logits.device)
        seen = self._drawn if self._seen is None else self._seen
        _sample_kernel[(rows,)](
            results,
            self._drawn,
            logits,
            parameters,
            seen,
            self._ends,
            logits.stride(0),
            vocabulary,
            len(self._ends),
            rows,
            PARAMETERS=PARAMETERS,
            ZEROS={torch.bfloat16: 16, torch.float16: 13}.get(logits.dtype, 0),
            COLUMNS=min(triton.next_power_of_2(vocabulary), 16384),
            num_warps=32 if vocabulary > 8192 else 8,
        )
        return results

    def _remember(self, slot: int, tokens: Sequence[int]) -> None:
        """Let the penalty of a slot's new sequence be for these tokens; the kernel adds those that are drawn."""
        if self._seen is None:
            shape = (len(self._drawn), self._vocabulary)
            self._seen = torch.zeros(shape, dtype=torch.int8, device=self._drawn.device)
        row = self._seen[slot]
        row.zero_()
        row[upload(np.array(tokens, dtype=np.int64), row.device)] = 1


class _Drawing:
    """What a launch gives, on its way to the host: `scores` are those of the rows in `told`."""

    def __init__(
        self,
        results: torch.Tensor,
        samplers: Sequence[Sampler],
        told: Sequence[int],
        scores: torch.Tensor | None,
    ) -> None:
        self._samplers, self._told = samplers, told
        self._results = _on_its_way(results)
        self._scores = None if scores is None else _on_its_way(scores)
        self._done: torch.cuda.Event | None = None
        if results.is_cuda:
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def wait(self) -> Drawn:
        """Wait for the device; see Draw."""
        if self._done is not None:
            self._done.synchronize()
        tokens: list[int] = self._results[0].tolist()
        numbers: list[float] = self._results[1].view(torch.float32).tolist()
        drawn: dict[int, Scored] = {row: (numbers[row], ()) for row, s in enumerate(self._samplers) if s.logprobs}
        if self._scores is not None:
            for row, (own, *scores) in zip(self._told, self._scores.tolist(), strict=True):
                count = self._samplers[row].top_logprobs
                ids, values = scores[: len(scores) // 2], scores[len(scores) // 2 :]
                drawn[row] = own, tuple(zip(map(int, ids[:count]), values[:count], strict=True))
        return Drawn(tokens, drawn)


def _scores_of(
    logits: torch.Tensor, results: torch.Tensor, rows: Sequence[int], samplers: Sequence[Sampler]
) -> torch.Tensor:
    """Return, for some rows, the log probability of the token drawn, then the most likely tokens, then theirs."""
    places = upload(np.array(rows, dtype=np.int64), logits.device)
    scores = logits[places].float()
    totals = scores.logsumexp(dim=-1, keepdim=True)
    own = scores.gather(-1, results[0][places].clamp(min=0).long()[:, None])
    top = scores.topk(min(max(samplers[row].top_logprobs for row in rows), scores.shape[-1]), dim=-1)
    # A token id is exact as a float32 up to 2**24.
    return torch.cat([own - totals, top.indices.float(), top.values - totals], dim=-1)


def _on_its_way(result: torch.Tensor) -> torch.Tensor:
    if not result.is_cuda:
        return result
    host = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
    return host.copy_(result, non_blocking=True)


@triton.jit(do_not_specialize=["parameters", "ends", "rows", "results"])
def _sample_kernel(
    results: tl.tensor,
    drawn: tl.tensor,
    logits: tl.tensor,
    parameters: tl.tensor,
    seen: tl.tensor,
    ends: tl.tensor,
    stride: tl.tensor,
    vocabulary: tl.tensor,
    num_ends: tl.tensor,
    rows: tl.tensor,
    PARAMETERS: tl.constexpr,
    ZEROS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    numbers = parameters + row * PARAMETERS
    slot = tl.load(numbers).to(tl.int64)
    flags = tl.load(numbers + 1)
    top_k = tl.load(numbers + 2).to(tl.float32)
    scale = tl.load(numbers + 3).to(tl.float32, bitcast=True)
    top_p = tl.load(numbers + 4).to(tl.float32, bitcast=True)
    penalty = tl.load(numbers + 5).to(tl.float32, bitcast=True)
    uniform = tl.load(numbers + 6).to(tl.float32, bitcast=True)
    logits += row.to(tl.int64) * stride
    seen += slot * vocabulary

    # The largest score and its token; the model's own largest and sum of exponentials, for the log probability.
    best = float("-inf")
    token = 0
    top = float("-inf")
    total = 0.0
    strange = 0
    for start in range(0, vocabulary, COLUMNS):
        plain, scores = _scores(logits, seen, ends, start, vocabulary, num_ends, flags, penalty, COLUMNS)
        strange += tl.sum((plain != plain).to(tl.int32), 0)
        new_top = tl.maximum(top, tl.max(plain, 0))
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2((top - safe_top) * LOG2_E) + tl.sum(tl.exp2((plain - safe_top) * LOG2_E), 0)
        top = new_top
        highest = tl.max(scores, 0)
        if highest > best:
            best = highest
            token = start + tl.argmax(scores, 0)
    finite = (strange == 0) & (top < float("inf")) & (top > float("-inf"))

    if finite & ((flags & SAMPLED) != 0) & ((flags & GREEDY) == 0):
        # Scores as integers of the same order, without the bits that are the same in all logits of this type.
        zeros = tl.where((flags & PENALISED) != 0, 0, ZEROS)
        highest_key = _key(best, zeros).to(tl.int64)
        lowest_key = tl.full([], -(2**31), tl.int64) >> zeros
        floor = lowest_key
        if (flags & TOP_K) != 0:
            floor = _floor(logits, seen, ends, vocabulary, num_ends, flags, penalty, best, 0.0, zeros, lowest_key,
                           highest_key, top_k, COLUMNS)  # fmt: skip
        mass = _above(logits, seen, ends, vocabulary, num_ends, flags, penalty, best, scale, zeros, floor, COLUMNS)
        if (flags & TOP_P) != 0:
            floor = _floor(logits, seen, ends, vocabulary, num_ends, flags, penalty, best, scale, zeros, floor,
                           highest_key, top_p * mass, COLUMNS)  # fmt: skip
            mass = _above(logits, seen, ends, vocabulary, num_ends, flags, penalty, best, scale, zeros, floor, COLUMNS)
        token = _invert(logits, seen, ends, vocabulary, num_ends, flags, penalty, best, scale, zeros, floor,
                        uniform * mass, token, COLUMNS)  # fmt: skip

    tl.store(results + row, tl.where(finite, token, -1))
    if finite & ((flags & SAMPLED) != 0):
        own = tl.load(logits + token).to(tl.float32)
        logprob = own - top - tl.log(total)
        tl.store(results + rows + row, logprob.to(tl.int32, bitcast=True))
        if (flags & PENALISED) != 0:
            tl.store(seen + token, 1)
    if (flags & SAMPLED) != 0:
        # Also where there is none: the next step may have begun, and looks it up in the embeddings.
        tl.store(drawn + slot, tl.where(finite, token, 0))


@triton.jit
def _scores(
    logits: tl.tensor,
    seen: tl.tensor,
    ends: tl.tensor,
    start: tl.tensor,
    vocabulary: tl.tensor,
    num_ends: tl.tensor,
    flags: tl.tensor,
    penalty: tl.tensor,
    COLUMNS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The logits of COLUMNS tokens, and the same with penalty and forbidden tokens."""
    index = start + tl.arange(0, COLUMNS)
    inside = index < vocabulary
    plain = tl.load(logits + index, mask=inside, other=float("-inf")).to(tl.float32)
    scores = plain
    if (flags & PENALISED) != 0:
        was_seen = tl.load(seen + index, mask=inside, other=0) != 0
        scores = tl.where(was_seen, tl.where(scores < 0, scores * penalty, scores / penalty), scores)
    if (flags & ENDLESS) != 0:
        for number in range(num_ends):
            scores = tl.where(index == tl.load(ends + number), float("-inf"), scores)
    return plain, scores


@triton.jit
def _key(scores: tl.tensor, zeros: tl.tensor) -> tl.tensor:
    """Integers that are ordered as the scores are."""
    bits = scores.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> zeros


@triton.jit
def _above(
    logits: tl.tensor,
    seen: tl.tensor,
    ends: tl.tensor,
    vocabulary: tl.tensor,
    num_ends: tl.tensor,
    flags: tl.tensor,
    penalty: tl.tensor,
    best: tl.tensor,
    scale: tl.tensor,
    zeros: tl.tensor,
    floor: tl.tensor,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """The sum of the weights of all scores from `floor` on; with `scale` 0 it is their number."""
    sums = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, vocabulary, COLUMNS):
        _, scores = _scores(logits, seen, ends, start, vocabulary, num_ends, flags, penalty, COLUMNS)
        sums += _weights(scores, best, scale, zeros, floor)
    return tl.sum(sums, 0)


@triton.jit
def _weights(scores: tl.tensor, best: tl.tensor, scale: tl.tensor, zeros: tl.tensor, floor: tl.tensor) -> tl.tensor:
    chosen = (_key(scores, zeros) >= floor.to(tl.int32)) & (scores > float("-inf"))
    return tl.where(chosen, tl.exp2((scores - best) * scale), 0.0)


@triton.jit
def _floor(
    logits: tl.tensor,
    seen: tl.tensor,
    ends: tl.tensor,
    vocabulary: tl.tensor,
    num_ends: tl.tensor,
    flags: tl.tensor,
    penalty: tl.tensor,
    best: tl.tensor,
    scale: tl.tensor,
    zeros: tl.tensor,
    lowest: tl.tensor,
    highest: tl.tensor,
    wanted: tl.tensor,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """The largest key from which on the weights add up to `wanted`, or `lowest`."""
    high = highest + 1
    width = (tl.full([], FIRST_RANGE, tl.int64) >> zeros) + 1
    low = tl.maximum(high - width, lowest)
    while (low > lowest) & (
        _above(logits, seen, ends, vocabulary, num_ends, flags, penalty, best, scale, zeros, low, COLUMNS) < wanted
    ):
        high = low
        width *= 8
        low = tl.maximum(high - width, lowest)
    while high - low > 1:
        middle = low + (high - low) // 2
        mass = _above(logits, seen, ends, vocabulary, num_ends, flags, penalty, best, scale, zeros, middle, COLUMNS)
        enough = mass >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def _invert(
    logits: tl.tensor,
    seen: tl.tensor,
    ends: tl.tensor,
    vocabulary: tl.tensor,
    num_ends: tl.tensor,
    flags: tl.tensor,
    penalty: tl.tensor,
    best: tl.tensor,
    scale: tl.tensor,
    zeros: tl.tensor,
    floor: tl.tensor,
    target: tl.tensor,
    token: tl.tensor,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """The first token at which the sum of the weights so far exceeds `target`; if rounding leaves none, `token`."""
    before = 0.0
    start = 0
    while start < vocabulary:
        _, scores = _scores(logits, seen, ends, start, vocabulary, num_ends, flags, penalty, COLUMNS)
        weights = _weights(scores, best, scale, zeros, floor)
        here = tl.sum(weights, 0)
        if (before + here > target) & (here > 0):
            reached = (before + tl.cumsum(weights, 0) > target) & (weights > 0)
            index = start + tl.arange(0, COLUMNS)
            found = tl.min(tl.where(reached, index, vocabulary), 0)
            last = tl.max(tl.where(weights > 0, index, 0), 0)
            token = tl.where(found < vocabulary, found, last)
            start = vocabulary
        before += here
        start += COLUMNS
    return token
