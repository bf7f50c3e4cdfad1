import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mii_hpc.config import GenerateParamsConfig  # noqa: E402
from mii_hpc.engine.sampling.base import NOT_FINITE, Sampler  # noqa: E402
from mii_hpc.engine.sampling.host import CANDIDATES, choose  # noqa: E402

pytestmark = pytest.mark.engine
SAMPLES = 2000
# Of a chi-square distribution, exceeded by chance once in ten thousand runs; the seeds are fixed besides.
RARE = 3.72


def sampler(vocabulary, index=0, prompt=(0,), eos=(), guide=None, **options):
    return Sampler(GenerateParamsConfig(**options), prompt, vocabulary, eos, index, guide)


def expected(logits, temperature=1.0, top_k=None, top_p=1.0):
    """The distribution, written down from the options' definition, one token after the other."""
    scores = (logits / temperature).double()
    order = scores.argsort(descending=True)[:top_k].tolist()
    total = scores[order].exp().sum()
    result, before = {}, 0.0
    for token in order:
        if before >= top_p:
            break
        result[token] = float(scores[token].exp() / total)
        before += result[token]
    mass = sum(result.values())
    return {token: value / mass for token, value in result.items()}


def chi_square(counts, probabilities):
    """How far counts are from probabilities, in standard deviations; rare tokens are taken together."""
    common = {t: p for t, p in probabilities.items() if p * SAMPLES >= 5}
    pairs = [(counts.get(t, 0), p * SAMPLES) for t, p in common.items()]
    rest = SAMPLES - sum(wanted for _, wanted in pairs)
    if rest > 5:
        pairs.append((SAMPLES - sum(got for got, _ in pairs), rest))
    freedom = len(pairs) - 1
    value = sum((got - wanted) ** 2 / wanted for got, wanted in pairs)
    # Wilson and Hilferty's approximation.
    return ((value / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


def counts_of(logits, **options):
    samplers = [sampler(len(logits), index, seed=7, **options) for index in range(SAMPLES)]
    counts = {}
    for token_id in choose(logits.expand(SAMPLES, -1), samplers).token_ids:
        counts[token_id] = counts.get(token_id, 0) + 1
    return counts


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 1.0},
        {"top_p": 0.9},
        {"top_p": 0.5, "temperature": 1.7},
        {"top_p": 1.0, "top_k": 10},
        {"top_p": 0.8, "top_k": 30, "temperature": 0.7},
        {"top_p": 0.95, "temperature": 5.0},  # more tokens than CANDIDATES
        {"top_p": 0.9, "top_k": 200, "temperature": 4.0},
        {"top_p": 1.0, "top_k": 10**9},
    ],
)
def test_the_distribution_is_that_of_the_options(options):
    logits = torch.randn(600, generator=torch.Generator().manual_seed(3)) * 2
    counts = counts_of(logits, **options)
    shape = expected(logits, **options)
    assert set(counts) <= set(shape)
    assert chi_square(counts, shape) < RARE


def test_the_test_can_fail():
    logits = torch.randn(600, generator=torch.Generator().manual_seed(3)) * 2
    assert chi_square(counts_of(logits, top_p=1.0), expected(logits, temperature=1.2)) > RARE
    assert len(expected(logits, top_p=0.95, temperature=5.0)) > CANDIDATES


def test_a_row_does_not_depend_on_its_company():
    logits = torch.randn(64, 300, generator=torch.Generator().manual_seed(5)) * 3
    kinds = [{"top_p": 1.0}, {"top_p": 0.9}, {"top_k": 5}, {"temperature": 20.0}, {"do_sample": False}]

    def samplers():
        return [sampler(300, seed=row, **kinds[row % len(kinds)]) for row in range(64)]

    together = choose(logits, samplers()).token_ids
    alone = [choose(logits[row : row + 1], [one]).token_ids[0] for row, one in enumerate(samplers())]
    assert together == alone


def test_rows_with_numbers_not_finite_have_no_token_and_harm_nobody():
    logits = torch.zeros(4, 10)
    logits[0, 3] = torch.nan
    logits[1, 3] = torch.inf
    logits[2] = -torch.inf
    logits[3, 7] = 9
    for options in ({"do_sample": False}, {"top_k": 1}):
        drawn = choose(logits, [sampler(10, **options) for _ in range(4)])
        assert drawn.token_ids == [NOT_FINITE, NOT_FINITE, NOT_FINITE, 7]


def test_logprobs_are_the_models_own():
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(1))
    options = {"logprobs": True, "temperature": 3.0, "repetition_penalty": 2.0}
    token_ids, scores = choose(logits, [sampler(50, seed=row, **options) for row in range(2)])
    for row, token_id in enumerate(token_ids):
        assert scores[row] == (pytest.approx(float(logits[row].log_softmax(-1)[token_id]), abs=1e-5), ())


def test_the_most_likely_tokens_are_told_of_in_their_order():
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(1))
    few, none = (sampler(50, seed=1, logprobs=True, top_logprobs=count, logit_bias={7: 100.0}) for count in (3, 0))
    token_ids, scores = choose(logits, [few, none])
    logprob, top = scores[0]
    values, ids = logits[0].log_softmax(-1).topk(3)
    assert [token_id for token_id, _ in top] == ids.tolist()
    assert [value for _, value in top] == pytest.approx(values.tolist(), abs=1e-5)
    assert (token_ids[0], scores[1][1]) == (7, ())
    assert logprob == pytest.approx(float(logits[0].log_softmax(-1)[7]), abs=1e-5)


def drawn(logits, count, **options):
    """What a greedy sequence draws from the same logits, each token of which joins the answer."""
    tokens = [0]
    one = sampler(len(logits), prompt=tokens, do_sample=False, **options)
    for _ in range(count):
        tokens += choose(logits[None], [one]).token_ids
    return tokens[1:]


def test_penalties_are_for_the_tokens_of_the_answer():
    logits = torch.tensor([9.0, 5.0, 4.2, 0.0])
    assert drawn(logits, 3) == [0, 0, 0]  # the prompt's own token is not penalised
    assert drawn(logits, 7, presence_penalty=2.0, logit_bias={0: -8.0}) == [1, 2, 1, 1, 1, 1, 1]
    assert drawn(logits, 6, frequency_penalty=2.0) == [0, 0, 0, 1, 2, 0]
    assert drawn(logits, 3, frequency_penalty=-2.0, logit_bias={3: 8.99}) == [0, 0, 0]


def test_a_bias_is_added_before_all_else_and_unknown_tokens_are_ignored():
    logits = torch.tensor([1.0, 2.0, 3.0])
    assert drawn(logits, 1, logit_bias={0: 2.5, 99: 100.0}) == [0]
    assert drawn(logits, 1, logit_bias={2: -100.0}) == [1]
    counts = counts_of(torch.zeros(4), top_p=1.0, logit_bias={1: math.log(3)})
    assert chi_square(counts, {0: 1 / 6, 1: 1 / 2, 2: 1 / 6, 3: 1 / 6}) < RARE


def test_the_end_is_forbidden_until_the_minimum():
    logits = torch.tensor([[0.0, 9.0, 5.0]])
    one = sampler(3, eos=(1,), do_sample=False, min_new_tokens=2)
    assert [choose(logits, [one]).token_ids for _ in range(3)] == [[2], [2], [1]]


class Only:
    """Allows some tokens, and those that end an answer once it may."""

    def __init__(self, *tokens, ends=()):
        self._tokens, self._ends = tokens, ends

    def allowed(self, may_end):
        allowed = np.zeros(8, dtype=bool)
        allowed[[*self._tokens, *(self._ends if may_end else ())]] = True
        return allowed


def test_only_what_the_guide_allows_is_drawn_whatever_else_is_asked_for():
    logits = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3, 2]])
    options = [{"do_sample": False}, {"top_p": 0.01}, {"top_k": 1}, {"logit_bias": {0: 100, 6: -100}}, {"top_p": 1}]
    for option in options:
        guided = sampler(8, guide=Only(5, ends=(3,)), min_new_tokens=1, logprobs=True, top_logprobs=1, **option)
        drawn = [choose(logits, [guided, sampler(8, do_sample=False)]) for logits in [logits.expand(2, -1)] * 2]
        assert [each.token_ids for each in drawn] in ([[5, 0], [3, 0]], [[5, 0], [5, 0]])
        logprob, top = drawn[0].scores[0]
        assert logprob == pytest.approx(float(logits[0].log_softmax(-1)[5]))
        assert top[0][0] == 0
