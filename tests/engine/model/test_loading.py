import pytest

pytest.importorskip("torch")

from mii_hpc.errors import ConfigError
from tests.engine.collect import make
from tests.models import tiny_model

pytestmark = pytest.mark.engine


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
