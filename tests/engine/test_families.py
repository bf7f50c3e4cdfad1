"""Every family of models is served right, or refused in a sentence. A part of the list; with --families, all."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from transformers import AutoConfig, DynamicCache  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

from mii_hpc.architecture import CAUSAL_TYPES, Architecture  # noqa: E402
from mii_hpc.engine.model.check import PLAIN_CACHES  # noqa: E402
from mii_hpc.errors import ConfigError  # noqa: E402
from tests.engine.collect import make, running, submit  # noqa: E402
from tests.engine.families import FAMILIES, config_of, save_family, table  # noqa: E402
from tests.engine.reference import PROMPTS, Reference  # noqa: E402
from tests.engine.shards import shardings  # noqa: E402

pytestmark = pytest.mark.engine
# Prefilled in chunks, in blocks that none of the lengths is a multiple of.
SMALL = {"max_batch_size": 8, "max_batch_tokens": 32, "page_size": 8, "num_blocks": 256, "threads": 1}
LONG = [*PROMPTS, "All that is gold does not glitter, not all those who wander are lost; " * 3]
IN_CI = {
    "llama4_text", "mixtral", "qwen2_moe-window", "gemma2", "phi3-longrope", "phimoe", "gpt_oss", "bloom", "falcon",
    "mpt", "diffllama", "deepseek_v3", "deepseek_v32", "jamba", "falcon_h1", "bert-encoder",
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """The models are so small that threads would wait for each other all the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request):
    if request.param.name not in IN_CI and not request.config.getoption("--families"):
        pytest.skip("with --families")
    return request.param


def test_a_family_is_served_right_or_refused(family, tmp_path, models):
    folder = str(tmp_path)
    if family.refused:
        config_of(family).save_pretrained(folder)
        with pytest.raises(ConfigError, match=family.refused):
            make(model_name_or_path=folder).load(lambda sentence: None)
        return
    save_family(family, tmp_path)
    reference = Reference(folder)
    options = {"max_new_tokens": 12, "do_sample": False, "logprobs": True}
    with running(make(model_name_or_path=folder, dtype="float32", inference_engine_config=SMALL)) as engine:
        together = [submit(engine, prompt, **options) for prompt in LONG]
        for one in together:
            one.wait()
        alone = [submit(engine, prompt, **options).wait() for prompt in LONG]
        scored = submit(engine, LONG[-1], prompt_logprobs=True, **options).wait().of()[0]
    (model,) = models
    assert model.serving.way == family.attention
    assert scored.prompt_logprobs == pytest.approx(reference.prompt_logprobs(LONG[-1]), abs=1e-4)
    for prompt, one, other in zip(LONG, together, alone, strict=True):
        assert one.token_ids() == reference.greedy(prompt, max_new_tokens=12)
        assert other.token_ids() == one.token_ids()
        expected = reference.stepwise_logprobs(prompt, one.token_ids())
        assert one.logprobs() == pytest.approx(expected, abs=1e-4)


@pytest.mark.timeout(3600)
def test_families_are_sharded_right_or_refused(request):
    if not request.config.getoption("--families"):
        pytest.skip("with --families")
    served = [family for family in FAMILIES if not family.refused]
    found = shardings(served, 600)
    for family in served:
        if family.sharding:
            assert found[family.name] == f"{family.sharding}, {family.attention}"
        else:
            assert found[family.name].startswith("tensor_parallel=2: neither DeepSpeed nor transformers' plan shards")


def test_the_login_node_knows_the_types_that_transformers_knows():
    assert sorted(CAUSAL_TYPES.split()) == sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_what_keeps_a_state_in_transformers_cache_is_refused_on_the_login_node():
    refused = 0
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = AutoConfig.for_model(kind)
            cache = DynamicCache(config=config)
        except Exception:  # noqa: BLE001 (it takes more than its type)
            continue
        if {type(layer) for layer in cache.layers} - PLAIN_CACHES:
            described = {**config.to_dict(), **config.get_text_config().to_dict()}
            assert Architecture.read(described.get).refused is not None, kind
            refused += 1
    assert refused > 20


def test_the_readme_tells_what_becomes_of_each_family():
    assert table() in (Path(__file__).parents[2] / "README.md").read_text()
