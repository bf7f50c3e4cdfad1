"""The self-check: what is wrong on purpose is seen before anything loads, and what was right once is remembered."""

import pytest

torch = pytest.importorskip("torch")

from mii_hpc.config import ModelConfig  # noqa: E402
from mii_hpc.engine.attention import interface  # noqa: E402
from mii_hpc.engine.attention.gather import GatherAttention  # noqa: E402
from mii_hpc.engine.attention.visibility import Visibility, visibility  # noqa: E402
from mii_hpc.engine.model import check  # noqa: E402
from mii_hpc.errors import ConfigError  # noqa: E402
from tests.engine.collect import make  # noqa: E402
from tests.engine.families import FAMILIES, MOE, Family, config_of  # noqa: E402
from tests.engine.interpreter import DEVICE  # noqa: E402
from tests.engine.shards import FAULTS, shardings  # noqa: E402
from tests.models import tiny_config, tiny_model  # noqa: E402

pytestmark = pytest.mark.engine


@pytest.fixture(autouse=True)
def records(monkeypatch, tmp_path):
    monkeypatch.setattr(check, "extensions_folder", lambda: tmp_path)
    return tmp_path / "served"


def served(architecture="mistral", **changes):
    config = tiny_config(architecture, **{"sliding_window": 16, **changes})
    model = ModelConfig(model_name_or_path="none", inference_engine_config={"attention": "gather"})
    return check.choose_serving(config, model, 1, DEVICE)


def test_a_state_that_no_short_prompt_shows_is_refused():
    # It compresses keys of 128 tokens at a time, and the prompts are shorter.
    small = {"n_routed_experts": 4, "q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 8, "num_key_value_heads": 1}
    config = config_of(Family("deepseek_v4", {**MOE, **small, "index_n_heads": 2, "index_head_dim": 16, "hc_mult": 2}))
    with pytest.raises(ConfigError, match="cannot be served: its cache has a DeepseekV4HCACache, which keeps a state"):
        check.choose_serving(config, ModelConfig(model_name_or_path="none"), 1, DEVICE)


@pytest.fixture
def no_other_way(monkeypatch):
    monkeypatch.setattr(check, "WAYS", ("paged",))


def differs():
    return pytest.raises(ConfigError, match=r"cannot be served: its answers would differ from transformers' own by \d")


def test_what_is_right_is_remembered(records, monkeypatch):
    serving = served()
    assert serving == check.Serving("whole", "paged", packed=True)
    assert len(list(records.iterdir())) == 1
    monkeypatch.setattr(check, "_tried", None)
    assert served() == serving
    with pytest.raises(TypeError):
        served(sliding_window=17)  # another configuration is tried again


def test_a_window_that_is_off_by_one(no_other_way, monkeypatch):
    def off(function, context):
        seen = visibility(function, context)
        return Visibility(seen.window + 1) if seen.window else seen

    monkeypatch.setattr(interface, "visibility", off)
    with differs():
        served()


def test_a_rope_of_the_wrong_base(no_other_way, monkeypatch):
    measure = check.measure

    def wrong(module, way, device, context):
        for name, buffer in module.named_buffers():
            if name.endswith("inv_freq"):
                buffer.pow_(0.9)
        return measure(module, way, device, context)

    monkeypatch.setattr(check, "measure", wrong)
    with differs():
        served()


def test_a_key_head_that_is_read_twice(no_other_way, monkeypatch):
    attend = GatherAttention._attend

    def twice(self, layer, query, key, value, *options):
        return attend(self, layer, query, key[:, :1].expand_as(key), value, *options)

    monkeypatch.setattr(GatherAttention, "_attend", twice)
    with differs():
        served()


def test_a_swapped_pair_of_layers(no_other_way, monkeypatch):
    shard = check.shard

    def swapped(module, *arguments):
        module, cuts = shard(module, *arguments)
        first, second = module.model.layers[0].mlp, module.model.layers[1].mlp
        first.up_proj, second.up_proj = second.up_proj, first.up_proj
        return module, cuts

    monkeypatch.setattr(check, "shard", swapped)
    with differs():
        served()


def test_a_dropped_scale(no_other_way, monkeypatch):
    shard = check.shard

    def dropped(module, *arguments):
        module, cuts = shard(module, *arguments)
        torch.nn.init.ones_(module.model.layers[1].input_layernorm.weight)
        return module, cuts

    monkeypatch.setattr(check, "shard", dropped)
    with differs():
        served()


def test_faults_of_two_ranks():
    llama = next(family for family in FAMILIES if family.name == "llama")
    found = shardings([llama], 120, ("", *FAULTS))
    assert found.pop("llama") == "DeepSpeed, paged"
    assert len(found) == len(FAULTS)
    for sentence in found.values():
        assert sentence.startswith("tensor_parallel=2: neither DeepSpeed nor transformers' plan shards llama right")
        assert "its answers would differ from transformers' own" in sentence


def test_where_one_way_is_wrong_another_is_taken(monkeypatch):
    monkeypatch.setattr(interface, "visibility", lambda function, context: Visibility(7))
    assert served().way == "cached"


def test_where_no_small_model_can_be_made_the_loaded_one_is_tried(monkeypatch, tmp_path, models):
    def impossible(config, ranks):
        raise ValueError("this configuration cannot be made small")

    monkeypatch.setattr(check, "miniature", impossible)
    folder = str(tiny_model(tmp_path / "model", "mistral", sliding_window=24))
    make(model_name_or_path=folder, dtype="float32").load(lambda sentence: None)
    assert models[0].serving == check.Serving("whole", "paged", packed=False)
    monkeypatch.setattr(interface, "visibility", lambda function, context: Visibility(7))
    make(model_name_or_path=folder, dtype="bfloat16").load(lambda sentence: None)
    assert models[1].serving.way == "cached"


def test_a_small_model_that_finds_no_room_is_not_one_that_cannot_be_made(monkeypatch):
    def full(config, ranks):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(check, "miniature", full)
    with pytest.raises(torch.OutOfMemoryError):
        served()


@pytest.mark.parametrize("context", [1, 15, 16, 17, 40, 5000])
def test_windows_are_read_from_mask_functions(context):
    def window(batch, head, query, key):
        return (key <= query) & (key > query - 16)

    def causal(batch, head, query, key):
        return key <= query

    def chunked(batch, head, query, key):
        return (key <= query) & (key // 16 == query // 16)

    assert visibility(causal, context) == Visibility()
    assert visibility(window, context) == (Visibility(16) if context > 16 else Visibility())
    assert visibility(chunked, context) == (Visibility(mask=chunked) if context > 16 else Visibility())


def test_a_mask_that_shows_what_comes_is_refused():
    with pytest.raises(ConfigError, match="its tokens attend to later ones"):
        visibility(lambda batch, head, query, key: key <= query + 1, 100)
