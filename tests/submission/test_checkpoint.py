import json
import os
import subprocess
import sys

import pytest

from mii_hpc.config import ModelConfig
from mii_hpc.errors import ConfigError
from mii_hpc.submission.checkpoint import check_model

LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 4096}


@pytest.fixture
def model(tmp_path):
    """Make a model folder with the given config.json."""

    def make(config=LLAMA):
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        return folder

    return make


def checked(path, **fields):
    return check_model(ModelConfig(model_name_or_path=str(path), **fields))


def test_what_fits_is_accepted(model):
    assert checked(model(), tensor_parallel=8, max_length=4096).model_name_or_path == str(model())
    assert checked(model({"text_config": None}), tensor_parallel=7)


@pytest.mark.parametrize(
    ("config", "fields", "sentence"),
    [
        (LLAMA, {"tensor_parallel": 3}, "tensor_parallel=3: does not divide the model's 32 attention heads; "
                                        "allowed are 1, 2, 4, 8"),
        (LLAMA, {"tensor_parallel": 16}, "tensor_parallel=16: does not divide the model's 8 KV heads; "
                                         "allowed are 1, 2, 4, 8"),
        ({"n_head": 12}, {"tensor_parallel": 5}, "tensor_parallel=5: does not divide the model's 12 attention heads; "
                                                 "allowed are 1, 2, 3, 4, 6, 12"),
        ({"text_config": LLAMA}, {"tensor_parallel": 3}, "tensor_parallel=3: does not divide"),
        (LLAMA, {"max_length": 4097}, "max_length=4097: the model's context is 4096 tokens, and no more is allowed"),
        ({"n_positions": 1024}, {"max_length": 2048}, "max_length=2048: the model's context is 1024 tokens"),
        ("not json", {}, "config.json is unreadable"),
        ("[1]", {}, "config.json is unreadable"),
        ('{"text_config": 3}', {}, "config.json is unreadable"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(model, config, fields, sentence):
    with pytest.raises(ConfigError) as refusal:
        checked(model(config), **fields)
    assert sentence in str(refusal.value)


def test_a_folder_without_config_json_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=rf"^model_name_or_path='{tmp_path}': the folder has no config.json"):
        checked(tmp_path)


@pytest.mark.parametrize("name", ["/no/such/folder", "./absent", "a/b/c", "~/absent", ".."])
def test_a_folder_that_does_not_exist_is_refused(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^model_name_or_path='.*': (no such folder|the folder has no config.json)"):
        checked(name)


def test_the_path_becomes_absolute_but_keeps_its_links(model, monkeypatch, tmp_path):
    (tmp_path / "link").symlink_to(model())
    monkeypatch.chdir(tmp_path)
    assert checked("link").model_name_or_path == str(tmp_path / "link")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert checked("~/model").model_name_or_path == str(tmp_path / "model")


def test_the_echo_engine_needs_no_model():
    config = ModelConfig(inference_engine_config={"engine": "echo"}, tensor_parallel=3)
    assert check_model(config) is config


HUB = """
from mii_hpc.submission.checkpoint import check_model
from mii_hpc.config import ModelConfig
from mii_hpc.errors import ConfigError

for name, tp in (("org/cached", 4), ("org/cached", 3), ("org/absent", 1)):
    try:
        print(check_model(ModelConfig(model_name_or_path=name, tensor_parallel=tp)).model_name_or_path)
    except ConfigError as error:
        print(error)
"""


def test_hub_names_come_from_the_cache_when_offline(tmp_path):
    cached = tmp_path / "hub" / "models--org--cached"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("c0ffee")
    (cached / "snapshots" / "c0ffee").mkdir(parents=True)
    (cached / "snapshots" / "c0ffee" / "config.json").write_text(json.dumps(LLAMA))
    # A process of its own, because huggingface_hub reads its environment when it is imported.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE"))}
    done = subprocess.run(
        [sys.executable, "-c", HUB],
        env={**environment, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    found, wrong_shape, absent = done.stdout.splitlines()
    assert found == "org/cached"
    assert wrong_shape.startswith("tensor_parallel=3: does not divide the model's 32 attention heads")
    assert absent.startswith("model_name_or_path='org/absent': no such folder, and neither the Hugging Face")


def test_tokenizer_is_checked_before_the_queue(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"num_attention_heads": 4}')
    checked = check_model(ModelConfig(model_name_or_path=str(folder), tokenizer=str(folder / ".." / "model")))
    assert checked.tokenizer == str(folder)
    with pytest.raises(ConfigError, match=r"tokenizer='/nowhere/at/all': no such folder"):
        check_model(ModelConfig(model_name_or_path=str(folder), tokenizer="/nowhere/at/all"))
