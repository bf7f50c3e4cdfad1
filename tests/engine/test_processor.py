"""Processors with and without instructions for bfloat16: both are tested on either."""

import logging

import pytest

torch = pytest.importorskip("torch")

from mii_hpc.engine import processor  # noqa: E402
from tests.engine.collect import make, running, submit  # noqa: E402
from tests.engine.pair import Replica  # noqa: E402
from tests.engine.reference import PROMPTS, Reference  # noqa: E402
from tests.models import tiny_model  # noqa: E402

pytestmark = pytest.mark.engine
SMALL = {"max_batch_size": 8, "max_batch_tokens": 40, "page_size": 8}
ON_CPU = {"device": "cpu", "inference_engine_config": SMALL}


@pytest.fixture(scope="module", params=["bfloat16", "float16"])
def stored(request):
    """The dtype of a checkpoint."""
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory, stored):
    return str(tiny_model(tmp_path_factory.mktemp(stored), dtype=stored))


@pytest.fixture
def without(monkeypatch):
    """A processor that multiplies nothing but float32."""
    monkeypatch.setattr(processor, "multiplies", lambda dtype: dtype is torch.float32)


def linear_dtypes(model):
    layers = model.module.model.layers
    return {parameter.dtype for layer in layers for name, parameter in layer.named_parameters() if "proj" in name}


def kv_dtypes(model):
    return {layer.dtype for layer in model.layers}


def test_auto_is_float32_and_says_so(without, models, folder, stored, caplog):
    reference = Reference(folder)
    with caplog.at_level(logging.WARNING), running(make(model_name_or_path=folder, **ON_CPU)) as engine:
        assert linear_dtypes(models[0]) == kv_dtypes(models[0]) == {torch.float32}
        parameters = models[0].module.parameters()
        assert models[0].weights == 4 * sum(parameter.numel() for parameter in parameters)
        for prompt in PROMPTS:
            answer = submit(engine, prompt, do_sample=False, max_new_tokens=20).wait()
            assert answer.token_ids() == reference.greedy(prompt, max_new_tokens=20)
    assert f"no instructions for the checkpoint's {stored}, so the model is served in float32" in caplog.text


def test_what_is_asked_for_by_name_works(without, models, folder, stored, caplog):
    with caplog.at_level(logging.WARNING), running(make(model_name_or_path=folder, dtype=stored, **ON_CPU)) as engine:
        assert linear_dtypes(models[0]) == {torch.float32}
        assert kv_dtypes(models[0]) == {getattr(torch, stored)}
        _assert_near_the_reference(engine, models[0], folder)
    assert f"dtype='{stored}': this processor has no instructions for it" in caplog.text


def test_what_the_processor_multiplies_is_served_as_it_is(monkeypatch, models, folder, stored):
    dtype = getattr(torch, stored)
    if not processor.multiplies(dtype):  # which oneDNN refuses to pack then
        monkeypatch.setattr(processor, "multiplies", lambda asked: asked in (torch.float32, dtype))
        monkeypatch.setattr("mii_hpc.engine.model.packing.packed_dtype", lambda dtype: None)
    with running(make(model_name_or_path=folder, **ON_CPU)) as engine:
        assert linear_dtypes(models[0]) == kv_dtypes(models[0]) == {dtype}
        _assert_near_the_reference(engine, models[0], folder)


def _assert_near_the_reference(engine, model, folder):
    reference = Reference(folder)
    # Rounded, rotary frequencies would tell positions apart ever worse.
    for name, buffer in reference.buffers():
        assert torch.equal(model.module.get_buffer(name), buffer)
    for prompt in PROMPTS:
        answer = submit(engine, prompt, do_sample=False, max_new_tokens=4, logprobs=True, ignore_eos=True).wait()
        expected = reference.logprobs(prompt, answer.token_ids())
        assert answer.logprobs() == pytest.approx(expected, abs=0.3)


@pytest.mark.timeout(600)
def test_ranks_on_a_processor_without_avx512(tmp_path, monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    # DeepSpeed gives the second rank nothing of the tied head; its part in the all-reduce must be of the same kind.
    folder = str(tiny_model(tmp_path, "qwen2", dtype="bfloat16", tie_word_embeddings=True))
    reference = Reference(folder)
    with Replica(model_name_or_path=folder, dtype="bfloat16", **ON_CPU) as replica:
        assert replica.ready() is None
        answers = replica.answers([(prompt, {"do_sample": False, "max_new_tokens": 20}) for prompt in PROMPTS])
    for prompt, (_, token_ids, _) in zip(PROMPTS, answers, strict=True):
        # Drawn from the logits of bfloat16, and so about as likely to the reference as its own choice.
        best = reference.greedy(prompt, max_new_tokens=1)
        chosen, highest = (reference.logprobs(prompt, first)[0] for first in (token_ids[:1], best))
        assert chosen == pytest.approx(highest, abs=0.3)
    assert [process.exitcode for process in replica.processes] == [0, 0]
