from pathlib import Path

import pytest

pytest.importorskip("torch")

from mii_hpc.errors import ConfigError
from tests.engine.collect import make, running, submit
from tests.engine.pair import Replica
from tests.engine.reference import PROMPTS, Reference
from tests.models import QUANTISATIONS, merge_adapter, quantise_checkpoint, save_adapter, tiny_model

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
GREEDY = {"do_sample": False, "max_new_tokens": 8}


def test_a_checkpoint_that_lacks_weights_is_refused_by_name(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tiny_model(tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    engine = make(model_name_or_path=str(folder))
    with pytest.raises(ConfigError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        engine.load(lambda sentence: None)


def test_a_folder_without_a_model_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="model_name_or_path"):
        make(model_name_or_path=str(tmp_path)).load(lambda sentence: None)


def test_a_tensor_that_its_layer_does_not_know_is_refused_by_name(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    folder = tiny_model(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["vision.weight"] = torch.ones(2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    make(model_name_or_path=str(folder)).load(lambda sentence: None)
    weights["model.layers.1.mlp.up_proj.bias"] = torch.ones(128)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"has model\.layers\.1\.mlp\.up_proj\.bias, which the architecture does not"):
        make(model_name_or_path=str(folder)).load(lambda sentence: None)


@pytest.mark.parametrize(
    ("kind", "architecture", "changes"),
    [*((kind, "llama", {}) for kind in QUANTISATIONS), ("fp8", "mixtral", {"num_local_experts": 4})],
)
def test_a_quantised_checkpoint_is_served_as_what_it_stands_for(tmp_path, kind, architecture, changes):
    plain = tiny_model(tmp_path / "plain", architecture, **changes)
    quantise_checkpoint(plain, kind, tmp_path / "quantised")
    reference = Reference(plain)
    with running(make(model_name_or_path=str(tmp_path / "quantised"))) as engine:
        for prompt in PROMPTS:
            assert submit(engine, prompt, **GREEDY).wait().token_ids() == reference.greedy(prompt, max_new_tokens=8)


def test_a_dropped_scale_is_refused_by_name(tmp_path):
    from safetensors.torch import load_file, save_file

    quantise_checkpoint(tiny_model(tmp_path / "plain"), "fp8", tmp_path / "quantised")
    weights = load_file(tmp_path / "quantised" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight_scale_inv"]
    save_file(weights, tmp_path / "quantised" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight_scale_inv"):
        make(model_name_or_path=str(tmp_path / "quantised")).load(lambda sentence: None)


@pytest.mark.parametrize(
    ("changes", "scale"),
    [({}, 2), ({"use_rslora": True}, 4), ({"alpha_pattern": {"q_proj": 2, r"layers\.\d+\.mlp\.down_proj": 2}}, 0.5)],
)
def test_an_adapter_is_merged(tmp_path, changes, scale):
    import shutil

    base = tiny_model(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", **changes)
    merged = Path(shutil.copytree(base, tmp_path / "merged"))
    merge_adapter(merged, adapter, scale)
    reference, without = Reference(merged), Reference(base)
    with running(make(model_name_or_path=str(base), adapter=str(adapter))) as engine:
        answers = [submit(engine, prompt, **GREEDY).wait().token_ids() for prompt in PROMPTS]
    assert answers == [reference.greedy(prompt, max_new_tokens=8) for prompt in PROMPTS]
    assert answers != [without.greedy(prompt, max_new_tokens=8) for prompt in PROMPTS]


def test_two_ranks_share_a_quantised_checkpoint_and_an_adapter(tmp_path):
    plain = tiny_model(tmp_path / "plain", num_key_value_heads=1)
    quantise_checkpoint(plain, "fp8", tmp_path / "base")
    adapter = save_adapter(plain, tmp_path / "adapter", ("q_proj", "k_proj", "down_proj", "lm_head"))
    merge_adapter(plain, adapter, 2)
    reference = Reference(plain)
    with Replica(model_name_or_path=str(tmp_path / "base"), adapter=str(adapter)) as replica:
        assert replica.ready() is None
        answers = replica.answers([(prompt, GREEDY) for prompt in PROMPTS])
    for prompt, (_, token_ids, _) in zip(PROMPTS, answers, strict=True):
        assert token_ids == reference.greedy(prompt, max_new_tokens=8)


def test_an_adapter_of_weights_that_are_not_read_is_refused(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    base = tiny_model(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    save_file(
        weights | {"vision.q_proj.weight": torch.ones(8, 8)}, base / "model.safetensors", metadata={"format": "pt"}
    )
    adapter = save_adapter(base, tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"it changes vision\.q_proj\.weight, which the architecture does not read"):
        make(model_name_or_path=str(base), adapter=str(adapter)).load(lambda sentence: None)
