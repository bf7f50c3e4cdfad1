"""Files that somebody else has written: whatever is in them, the login node passes them or refuses them in a line.

Each check must end in a moment; pytest's timeout is what a hang runs into.
"""

import json
import os
import random
import struct
from pathlib import Path

import pytest

from mii_hpc.config import ModelConfig, resolve
from mii_hpc.deployments.registry import Entry
from mii_hpc.errors import MIIError
from mii_hpc.submission.checkpoint import check_model

pytestmark = pytest.mark.filterwarnings("ignore")
CASES = 120
HUGE = "1" + "0" * 5000
DEEP = "[" * 20_000
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))

YAML = """
model_config: {model_name_or_path: m, tensor_parallel: 2, max_length: 4096, dtype: bfloat16}
deployment_name: chat
replica_num: 1
slurm: {partition: gpu, time: "8:00:00", setup: [module load openmpi], extra: {mail-type: FAIL}}
startup_timeout: 60.5
share: group:physics
"""
CONFIG = json.dumps(
    {"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 4096,
     "num_hidden_layers": 2, "layer_types": ["full_attention"], "text_config": {"n_head": 4},
     "quantization_config": None}
)  # fmt: skip
ENTRY = Entry(
    deployment_name="chat", model="m", tensor_parallel=1, replica_num=1, cluster="slurm", job_id="7", host="n1",
    address="10.0.0.1:80", fingerprint="ab", run_dir=Path("/runs/a"), submitted=1.0, heartbeat=1.0, detail="loading",
).model_dump_json()  # fmt: skip
TENSOR = "model.layers.0.mlp.weight"
NASTY = [
    "null", "true", "-1",
    "0", "1e999", "NaN", HUGE, f"-{HUGE}", "0x" + "f" * 6000, "1000000000001", '"\\u001b[2J"', "[]",
    "{}", '"\\ud800"', "[[[[", "{{", "}", "]", ",", ":", "\n", "\x1b", "\0", "\xff", "*a", "&a", "<<: *a", "!!int x",
    "!!python/object/apply:os.system [x]", "2020-99-99", "? ", "|", ">", "%", "- ", "1_0:90", "!!binary x", "!!set x",
]  # fmt: skip


def mutations(text: str, seed: str, count: int = CASES) -> list[bytes]:
    """Return broken copies of a text: cut, doubled, with bytes changed, and values put in others' places."""
    chance = random.Random(seed)
    made = []
    for _ in range(count):
        broken = text
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(broken) + 1)
            to = min(len(broken), at + chance.choice([0, 1, 1, 4, 20]))
            broken = broken[:at] + chance.choice([*NASTY, "", chr(chance.randrange(256))]) + broken[to:]
        made.append(
            broken.encode("utf-8", "surrogatepass") if chance.random() < 0.9 else broken.encode("latin-1", "replace")
        )
    return made


def passes_or_is_refused_in_a_line(check, name):
    try:
        check()
    except MIIError as error:
        said = str(error)
        assert said.isprintable() and len(said) < 5000 and name in said, said[:300]


YAMLS = {
    "aliases that grow": BOMB.encode(),
    "merges that grow": BOMB.replace("[x, x]", "{x: y}").replace("[*", "{<<: [*").replace("]\n", "]}\n").encode(),
    "an alias to itself": b"a: &a [*a]",
    "a merge of itself": b"a: &a {<<: *a}",
    "deep": b"a: " + DEEP.encode(),
    "deep maps": b"a: " + b"{a: " * 5000,
    "huge": b"replica_num: " + HUGE.encode(),
    "huge in hexadecimal": b"replica_num: 0x" + b"f" * 6000,
    "many unknown names": b"".join(b"x%d: 1\n" % n for n in range(3000)),
    "a name of several lines": b'"a\\nb\\e[2J": 1',
    "no date": b"deployment_name: 2020-99-99",
    "no int": b"a: !!int ''",
    "zeros": bytes(4096),
    "long": b"a: " + b"x" * 2**21,
    "keys that are none": b"? [a]\n: 1\n? {b: c}\n: 2\n1: 3\n",
}


@pytest.mark.parametrize("text", [*YAMLS.values(), None], ids=[*YAMLS, "mutations"])
def test_a_yaml_file(tmp_path, text):
    file = tmp_path / "deployment.yaml"
    for each in [text] if text is not None else mutations(YAML, "yaml"):
        file.write_bytes(each)
        passes_or_is_refused_in_a_line(lambda: resolve(mii_config=file), file.name)


CONFIGS = {
    "more heads than there can be": b'{"num_attention_heads": 1000000000001}',
    "more layers than there can be": b'{"num_hidden_layers": 1000000000001}',
    "huge": b'{"num_attention_heads": ' + HUGE.encode() + b"}",
    "deep": DEEP.encode(),
    "no list": b"[1]",
    "escapes": b'{"model_type": "mamba\\u001b[2J\\n", "is_encoder_decoder": true}',
    "a method that is none": b'{"quantization_config": {"quant_method": "\\n\\n"}}',
    "zeros": bytes(4096),
    "long": b'{"a": "' + b"x" * 2**26 + b'"}',
}


@pytest.mark.parametrize("text", [*CONFIGS.values(), None], ids=[*CONFIGS, "mutations"])
def test_a_config_json(tmp_path, text):
    for each in [text] if text is not None else mutations(CONFIG, "config"):
        (tmp_path / "config.json").write_bytes(each)
        weights(tmp_path, {TENSOR: ("F32", [2], [0, 8])})
        model = ModelConfig(model_name_or_path=str(tmp_path), tensor_parallel=7)
        passes_or_is_refused_in_a_line(lambda model=model: check_model(model), "")


def weights(folder, header, data=bytes(8), name="model.safetensors"):
    if isinstance(header, dict):
        header = json.dumps(
            {key: dict(zip(("dtype", "shape", "data_offsets"), told, strict=True)) for key, told in header.items()}
        )
    told = header if isinstance(header, bytes) else header.encode("utf-8", "surrogatepass")
    (folder / name).write_bytes(struct.pack("<Q", len(told)) + told + data)


WEIGHTS = {
    "cut in its length": b"\0\0\0",
    "zeros": bytes(100),
    "a length beyond its end": struct.pack("<Q", 2**63) + b"{}",
    "deep": struct.pack("<Q", 20_000) + DEEP.encode(),
    "huge": struct.pack("<Q", 5008) + b'{"a": ' + HUGE.encode() + b"}",
    "an offset beyond its end": {TENSOR: ("F32", [2**40], [0, 2**42])},
    "an offset that is none": {TENSOR: ("F32", [2], [0, 8.5])},
    "an offset before its beginning": {TENSOR: ("F32", [2], [-8, 0])},
    "a shape that is not its bytes": {TENSOR: ("F32", [2**20], [0, 8])},
    "a shape that is none": {TENSOR: ("F32", [2, "x"], [0, 8])},
    "a dtype that is none": {TENSOR: ("\x1b[2J", [2], [0, 8])},
    "tensors that overlap": {"a.weight": ("F32", [2], [0, 8]), "b.weight": ("F32", [2], [0, 8])},
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 1}')
    return tmp_path


@pytest.mark.parametrize("content", WEIGHTS.values(), ids=WEIGHTS)
def test_a_safetensors_file_that_lies_is_refused(folder, content):
    if isinstance(content, bytes):
        (folder / "model.safetensors").write_bytes(content)
    else:
        weights(folder, content)
    with pytest.raises(MIIError, match=r"model\.safetensors") as refused:
        check_model(ModelConfig(model_name_or_path=str(folder)))
    assert str(refused.value).isprintable()


def test_safetensors_files_with_broken_headers(folder):
    header = json.dumps({TENSOR: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {"a": "b"}})
    for each in [*mutations(header, "weights"), header.replace("layers.0", f"layers.{HUGE}").encode()]:
        weights(folder, each)
        model = ModelConfig(model_name_or_path=str(folder))
        passes_or_is_refused_in_a_line(lambda model=model: check_model(model), "")


@pytest.mark.parametrize("kind", ["fifo", "outside", "escapes", "a list", "deep", "numbers", "is a fifo itself"])
def test_an_index_that_leads_elsewhere_is_refused(folder, kind):
    index = folder / "model.safetensors.index.json"
    names = {"fifo": "fifo", "outside": "../x.safetensors", "escapes": "\x1b[2J", "a list": ["x"], "numbers": 7}
    index.write_text(json.dumps({"weight_map": {TENSOR: names.get(kind, "x")}}))
    if kind == "fifo":
        os.mkfifo(folder / "fifo")
    elif kind == "outside":
        weights(folder.parent, {TENSOR: ("F32", [2], [0, 8])}, name="x.safetensors")
    elif kind == "deep":
        index.write_text(DEEP)
    elif kind == "is a fifo itself":
        index.unlink()
        os.mkfifo(index)
        (folder / "model.safetensors").mkdir()
    with pytest.raises(MIIError, match=r"model\.safetensors") as refused:
        check_model(ModelConfig(model_name_or_path=str(folder)))
    assert str(refused.value).isprintable()


def test_files_that_are_none_are_refused(tmp_path):
    for name in ("fifo", "folder", "endless", "link"):
        path = tmp_path / name
        {"fifo": os.mkfifo, "folder": os.mkdir, "endless": Path.touch}.get(
            name, lambda path: path.symlink_to("/dev/zero")
        )(path)
        if name == "endless":
            os.truncate(path, 2**40)
        with pytest.raises(MIIError, match=name):
            resolve(mii_config=path)
        with pytest.raises(MIIError, match="chat_template"):
            resolve("m", inference_engine_config={}, chat_template=str(path))


def test_entries_of_a_registry(tmp_path):
    for each in [*mutations(ENTRY, "entry"), DEEP.encode(), b"", bytes(100)]:
        passes_or_is_refused_in_a_line(lambda each=each: Entry.parse(each, tmp_path / "chat.json"), "chat.json")
