"""A real model with its real tokenizer, where `make test-real` has made it."""

import math
import os

import pytest

pytest.importorskip("torch")

from tests.engine.collect import make, running, submit
from tests.engine.pair import Replica
from tests.engine.reference import Reference

FOLDER = os.environ.get("MII_REAL_MODEL", "")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not FOLDER, reason="`make test-real` makes the model"),
]
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "日本で一番高い山は",
    "Once upon a time 🙂🚀",
    "Q: What is 2 + 2?\nA:",
    "Für €5 bekommt man",
    "import numpy as np\n\n",
    "All happy families are alike; every unhappy family is unhappy in its own way. " * 45,
]
OPTIONS = {"do_sample": False, "max_new_tokens": 24}
SMALL = {"num_blocks": 256, "page_size": 16, "max_batch_tokens": 256, "max_batch_size": 8}
MODEL = {"model_name_or_path": FOLDER, "max_length": 2048, "inference_engine_config": SMALL}


@pytest.fixture(scope="module")
def expected():
    reference = Reference(FOLDER)
    return [reference.greedy(prompt, max_new_tokens=24) for prompt in PROMPTS]


def test_answers_are_generates_own(expected):
    with running(make(dtype="float32", **MODEL)) as engine:
        together = [submit(engine, prompt, **OPTIONS) for prompt in PROMPTS]
        assert [one.wait().token_ids() for one in together] == expected
        streamed = submit(engine, PROMPTS[2], stream=True, **OPTIONS).wait()
        assert streamed.token_ids() == expected[2]
        assert streamed.text() == engine.tokenizer.decode(expected[2], skip_special_tokens=True)


def test_answers_of_two_ranks_are_generates_own(expected):
    with Replica(dtype="float32", **MODEL) as replica:
        assert replica.ready() is None
        answers = replica.answers([(prompt, OPTIONS) for prompt in PROMPTS])
    assert [token_ids for _, token_ids, _ in answers] == expected


def test_bfloat16_says_the_same_at_first(expected):
    with running(make(dtype="bfloat16", **MODEL)) as engine:
        first = [submit(engine, prompt, **OPTIONS).wait().token_ids()[0] for prompt in PROMPTS]
    assert sum(one == other[0] for one, other in zip(first, expected, strict=True)) >= len(PROMPTS) - 1


def test_small_weights_cost_little_perplexity():
    from pydoc_data.topics import topics

    texts = [text[:1200] for text in topics.values() if len(text) > 1200][:4]

    def perplexity(**fields):
        values = []
        with running(make(dtype="float32", **MODEL, **fields)) as engine:
            for text in texts:
                answer = submit(engine, text, do_sample=False, max_new_tokens=1, prompt_logprobs=True).wait()
                values += answer.of()[0].prompt_logprobs
        return math.exp(-sum(values) / len(values))

    plain = perplexity()
    for mode, bound in {"int8": 1.01, "fp8": 1.03, "int4": 1.35}.items():
        assert perplexity(quantization_mode=mode) < bound * plain


def test_two_ranks_of_small_weights(expected):
    with Replica(dtype="float32", quantization_mode="int8", **MODEL) as replica:
        assert replica.ready() is None
        answers = replica.answers([(prompt, OPTIONS) for prompt in PROMPTS])
    first = [token_ids[0] for _, token_ids, _ in answers]
    assert sum(one == other[0] for one, other in zip(first, expected, strict=True)) >= len(PROMPTS) - 1
