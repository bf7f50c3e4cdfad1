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
IN_CI = {("fp8", "mixtral"), ("compressed-tensors", "llama"), ("gptq", "llama"), ("nf4", "llama"), ("mxfp4", "gpt_oss")}


def save_quantised(folder, kind, architecture="llama"):
    """Save a quantised model as `quantised`; return the folder of the plain one that it stands for."""
    changes = {"llama": {}, "mixtral": {"num_local_experts": 4}, "gpt_oss": {"num_local_experts": 4, "head_dim": 16}}
    plain = tiny_model(folder / "plain", architecture, **changes[architecture])
    quantise_checkpoint(plain, kind, folder / "quantised")
    return plain


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
    ("kind", "architecture"),
    [
        *((kind, "llama") for kind in QUANTISATIONS if kind != "mxfp4"),
        *((kind, "mixtral") for kind in ("fp8", "awq", "gptq")),
        ("mxfp4", "gpt_oss"),
    ],
)
def test_a_quantised_checkpoint_is_served_as_what_it_stands_for(tmp_path, kind, architecture, request):
    if (kind, architecture) not in IN_CI and not request.config.getoption("--families"):
        pytest.skip("with --families")
    plain = save_quantised(tmp_path, kind, architecture)
    reference = Reference(plain)
    with running(make(model_name_or_path=str(tmp_path / "quantised"))) as engine:
        for prompt in PROMPTS:
            assert submit(engine, prompt, **GREEDY).wait().token_ids() == reference.greedy(prompt, max_new_tokens=8)


@pytest.mark.parametrize(
    ("kind", "architecture"), [("gptq_v2", "llama"), ("awq", "mixtral"), ("nf4", "llama"), ("mxfp4", "gpt_oss")]
)
def test_two_ranks_share_a_quantised_checkpoint(tmp_path, kind, architecture, request):
    if not request.config.getoption("--families"):
        pytest.skip("with --families")
    plain = save_quantised(tmp_path, kind, architecture)
    reference = Reference(plain)
    with Replica(model_name_or_path=str(tmp_path / "quantised")) as replica:
        assert replica.ready() is None
        answers = replica.answers([(prompt, GREEDY) for prompt in PROMPTS])
    assert [token_ids for _, token_ids, _ in answers] == [reference.greedy(p, max_new_tokens=8) for p in PROMPTS]


def test_a_quantised_checkpoint_can_be_made_small_again(tmp_path):
    """The same as the plain weights that it stands for, made small."""
    plain = save_quantised(tmp_path, "gptq")
    answers = []
    for folder in (plain, tmp_path / "quantised"):
        with running(make(model_name_or_path=str(folder), quantization_mode="int4")) as engine:
            answers.append([submit(engine, prompt, **GREEDY).wait().token_ids() for prompt in PROMPTS])
    assert answers[0] == answers[1]


def test_a_dropped_scale_is_refused_by_name(tmp_path):
    from safetensors.torch import load_file, save_file

    quantise_checkpoint(tiny_model(tmp_path / "plain"), "fp8", tmp_path / "quantised")
    weights = load_file(tmp_path / "quantised" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight_scale_inv"]
    save_file(weights, tmp_path / "quantised" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight_scale_inv"):
        make(model_name_or_path=str(tmp_path / "quantised")).load(lambda sentence: None)


def test_a_bias_that_a_quantiser_adds_is_left_out_only_if_it_is_zero(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    save_quantised(tmp_path, "gptq")
    weights = load_file(tmp_path / "quantised" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.bias"] = torch.ones(128)
    save_file(weights, tmp_path / "quantised" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"has model\.layers\.1\.mlp\.up_proj\.bias, which the architecture does not"):
        make(model_name_or_path=str(tmp_path / "quantised")).load(lambda sentence: None)


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, 2),
        ({"use_dora": True}, 2),
        ({"use_rslora": True}, 4),
        ({"alpha_pattern": {"q_proj": 2, r"layers\.\d+\.mlp\.down_proj": 2}}, 0.5),
    ],
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
    quantise_checkpoint(plain, "gptq", tmp_path / "base")
    targets = ("q_proj", "k_proj", "down_proj", "lm_head")
    adapter = save_adapter(plain, tmp_path / "adapter", targets, use_dora=True)
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
