"""Compares the kernel with what the host draws: on CUDA where it is, and else in Triton's interpreter."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from mii_hpc.config import GenerateParamsConfig  # noqa: E402
from mii_hpc.engine.sampling.base import NOT_FINITE, Sampler  # noqa: E402
from mii_hpc.engine.sampling.host import choose  # noqa: E402
from mii_hpc.engine.step import Slice, Step  # noqa: E402
from tests.engine.interpreter import CUDA, DEVICE, runs_kernels  # noqa: E402

pytestmark = [pytest.mark.engine, runs_kernels]
ENDS = (3, 17)
OWN_END = 11
"""Ends the answers of the requests that name it."""
BORDER = 1e-5
"""By so much of the whole may the sums of tens of thousands of weights differ in float32."""
OPTIONS = [
    {"do_sample": False},
    {"top_p": 1.0},
    {"top_p": 0.9},
    {"top_p": 0.3, "temperature": 0.7},
    {"top_p": 1.0, "top_k": 1},
    {"top_p": 1.0, "top_k": 7},
    {"top_p": 0.8, "top_k": 40, "temperature": 1.5},
    {"top_p": 0.99, "temperature": 30.0},
    {"top_p": 0.95, "top_k": 500, "temperature": 5.0},
    {"do_sample": False, "repetition_penalty": 1.8},
    {"top_p": 0.7, "repetition_penalty": 0.5},
    {"do_sample": False, "min_new_tokens": 2, "max_new_tokens": 9},
    {"top_p": 0.9, "min_new_tokens": 2, "max_new_tokens": 9},
    {"do_sample": False, "min_new_tokens": 2, "max_new_tokens": 9, "stop_token_ids": [OWN_END]},
    {"top_p": 0.9, "min_new_tokens": 1, "max_new_tokens": 9, "stop_token_ids": [OWN_END], "top_logprobs": 2},
    {"do_sample": False, "frequency_penalty": 1.5, "presence_penalty": 0.5},
    {"top_p": 0.9, "frequency_penalty": -1.0, "repetition_penalty": 1.2},
    {"top_p": 1.0, "logit_bias": {3: -100.0, 5: 14.0}},
    {"do_sample": False, "top_logprobs": 5},
    {"top_p": 0.8, "logit_bias": {2: 12.0}, "presence_penalty": 2.0, "top_logprobs": 3},
    {"top_p": 0.9, "top_k": 40, "min_new_tokens": 1, "structured_outputs": {"json_object": True}, "top_logprobs": 2},
]


class Even:
    """Allows every other token."""

    def __init__(self, vocabulary):
        self._vocabulary = vocabulary

    def allowed(self, may_end):
        allowed = np.arange(self._vocabulary) % 2 == 0
        allowed[[*ENDS, OWN_END]] = may_end
        return allowed


@pytest.fixture
def kernels():
    """The module under test."""
    from mii_hpc.engine.sampling import triton

    return triton


def samplers(vocabulary, count, tokens=(5, 6, 7)):
    options = [GenerateParamsConfig(logprobs=True, seed=row, **OPTIONS[row % len(OPTIONS)]) for row in range(count)]
    guides = [Even(vocabulary) if params.structured_outputs else None for params in options]
    return [
        Sampler(params, [*tokens], vocabulary, (*ENDS, *params.stop_token_ids), 0, guide)
        for params, guide in zip(options, guides, strict=True)
    ]


class Shifted:
    """A sampler whose numbers are others by a little."""

    def __init__(self, shift, sampler):
        self._shift, self._sampler = shift, sampler

    def __getattr__(self, name):
        return getattr(self._sampler, name)

    def draw(self):
        return min(max(self._sampler.draw() + self._shift, 0.0), 1.0)


def step(count, fresh=True, sample=True):
    return Step.of(tuple(Slice(9, (1,), (1,), sample, slot, fresh) for slot in range(count)))


@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    [(50, torch.float32), (700, torch.float32), (700, torch.bfloat16), (700, torch.float16), (20000, torch.bfloat16)]
    + [(128256, dtype) for dtype in (torch.float32, torch.bfloat16) if CUDA],
)
def test_it_draws_what_the_host_draws(kernels, vocabulary, dtype):
    rows = len(OPTIONS) * (2 if vocabulary < 1000 or CUDA else 1)
    drawn = torch.zeros(rows + 1, dtype=torch.int64, device=DEVICE)
    backend = kernels.TritonSampling(drawn, vocabulary, ENDS)
    ours, theirs = samplers(vocabulary, rows), samplers(vocabulary, rows)
    generator = torch.Generator().manual_seed(vocabulary)
    for number in range(3 if vocabulary < 10_000 else 1):
        logits = (torch.randn(rows, vocabulary, generator=generator) * 3).to(dtype)
        logits[:, ENDS[0]] = 14  # the most likely token, where it may come
        logits[:, OWN_END] = 13
        expected = choose(logits, theirs)
        got = backend.draw(logits.to(DEVICE), step(rows, fresh=number == 0), ours).wait()
        if vocabulary > 10_000:  # at the border of two tokens, either
            for shift in (-BORDER, BORDER):
                near = choose(logits, [Shifted(shift, sampler) for sampler in samplers(vocabulary, rows)])
                for row, (token_id, other) in enumerate(zip(got.token_ids, near.token_ids, strict=True)):
                    if token_id == other:
                        expected.token_ids[row], expected.scores[row] = other, near.scores[row]
        assert got.token_ids == expected.token_ids
        assert drawn[:rows].tolist() == expected.token_ids
        for row in range(rows):
            (logprob, top), (wanted, most_likely) = got.scores[row], expected.scores[row]
            assert logprob == pytest.approx(wanted, abs=1e-3)
            assert [value for _, value in top] == pytest.approx([value for _, value in most_likely], abs=1e-3)
            assert len({token_id for token_id, _ in top}) == len(top)
        for sampler, token_id in zip(theirs, expected.token_ids, strict=True):
            sampler.tokens.append(token_id)  # on the device they are counted as they are drawn


def test_a_slot_forgets_what_its_last_sequence_has_seen(kernels):
    drawn = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    backend = kernels.TritonSampling(drawn, 8, ())
    logits = torch.tensor([[0.0, 5, 4, 3, 2, 1, 0, 0]], device=DEVICE)

    def one():
        params = GenerateParamsConfig(do_sample=False, repetition_penalty=10.0)
        return Sampler(params, [7], 8, (), 0)

    penalised = Sampler(GenerateParamsConfig(do_sample=False, presence_penalty=1.5), [7], 8, (), 0)

    def draw(sampler, **options):
        return backend.draw(logits, step(1, **options), [sampler]).wait().token_ids[0]

    assert [draw(penalised, fresh=fresh) for fresh in (True, False, False)] == [1, 2, 1]  # 5, 4; 3.5, 4; 3.5, 2.5, 3
    again = Sampler(GenerateParamsConfig(do_sample=False, presence_penalty=1.5), [7], 8, (), 0)
    assert draw(again, sample=False) != NOT_FINITE
    assert draw(again, fresh=False) == 1

    first, second = one(), one()
    assert [draw(first, fresh=fresh) for fresh in (True, False, False)] == [1, 2, 3]
    assert draw(second) == 1


def test_numbers_that_are_not_finite_give_no_token_and_one_that_exists(kernels):
    logits = torch.zeros(5, 10, device=DEVICE)
    logits[0, 3] = torch.nan
    logits[1, 3] = torch.inf
    logits[2] = -torch.inf
    logits[3, 7] = 9
    logits[4, 7] = torch.nan
    drawn = torch.full((6,), 8, dtype=torch.int64, device=DEVICE)
    for options in ({"do_sample": False}, {"top_k": 1}):
        backend = kernels.TritonSampling(drawn.fill_(8), 10, ())
        some = [Sampler(GenerateParamsConfig(**options), [1], 10, (), 0) for _ in range(5)]
        slices = tuple(Slice(9, (1,), (1,), row < 4, row) for row in range(5))
        token_ids = backend.draw(logits, Step.of(slices), some).wait().token_ids
        assert token_ids == [NOT_FINITE, NOT_FINITE, NOT_FINITE, 7, NOT_FINITE]
        assert drawn.tolist() == [0, 0, 0, 7, 8, 8]
        finite = backend.draw(torch.zeros(1, 10, device=DEVICE), step(1, sample=False), some[:1]).wait()
        assert finite.token_ids[0] != NOT_FINITE
