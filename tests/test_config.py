import json
import re
import warnings

import pytest
from pydantic import BaseModel

import mii_hpc
from mii_hpc.config import (
    SILENT,
    SUPERSEDED_MII_FIELDS,
    SUPERSEDED_MODEL_FIELDS,
    EngineConfig,
    GenerateParamsConfig,
    MIIConfig,
    MIIWarning,
    ModelConfig,
    SlurmConfig,
    default_home,
    resolve,
    seconds_of,
    validate,
)
from mii_hpc.errors import ConfigError, InvalidRequestError

NAME_RULE = "a name has 1 to 100 characters, a letter or digit among them"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"tensor_parallel": 0}, "tensor_parallel=0: Input should be greater than or equal to 1"),
        ({"tensor_parallel": "two"}, "tensor_parallel='two': Input should be a valid integer"),
        ({"tensor_parallel": 2.5}, "tensor_parallel=2.5: Input should be a valid integer"),
        ({"replica_num": 1025}, "replica_num=1025: Input should be less than or equal to 1024"),
        ({"max_length": 0}, "max_length=0: Input should be greater than or equal to 1"),
        ({"dtype": "int8"}, "dtype='int8': Input should be 'auto', 'float32', 'bfloat16' or 'float16'"),
        ({"task": "fill-mask"}, "task='fill-mask': Input should be 'text-generation'"),
        (
            {"tokenizer": 7},
            "tokenizer=7: must be a folder, a name on the Hugging Face hub, or a tokenizer of transformers",
        ),
        ({"device": "tpu"}, "device='tpu': Input should be 'auto', 'cuda' or 'cpu'"),
        ({"cluster": "pbs"}, "cluster='pbs': Input should be 'auto', 'slurm' or 'local'"),
        ({"port_number": 70000}, "port_number=70000: Input should be less than or equal to 65535"),
        ({"startup_timeout": 0}, "startup_timeout=0: Input should be greater than 0"),
        ({"queue_timeout": float("nan")}, "queue_timeout=nan: Input should be a finite number"),
        ({"wait": "perhaps"}, "wait='perhaps': Input should be a valid boolean"),
        ({"deployment_name": "../."}, f"deployment_name='../.': {NAME_RULE}"),
        ({"deployment_name": "a" * 101}, NAME_RULE),
        ({"slurm": "gpu"}, "slurm='gpu': Input should be a valid dictionary"),
        ({"slurm": {"gpus_per_node": -1}}, "slurm.gpus_per_node=-1: Input should be greater than or equal to 0"),
        ({"slurm": {"time": "soon"}}, "slurm.time='soon': "),
        ({"slurm": {"mem": "lots"}}, "slurm.mem='lots': "),
        ({"slurm": {"partition": "gpu\n#SBATCH --x"}}, "slurm.partition='gpu\\n#SBATCH --x': must be a single line"),
        ({"slurm": {"extra": {"mail-type": "FAIL\n#SBATCH --x"}}}, "must be a single line"),
        ({"slurm": {"extra": {"x\n#SBATCH --y": 1}}}, "must be a single line"),
        ({"slurm": {"srun_args": ["-v\n"]}}, "must be a single line"),
        (
            {"inference_engine_config": {"engine": "vllm"}},
            "inference_engine_config.engine='vllm': Input should be 'deepspeed' or 'echo'",
        ),
        (
            {"inference_engine_config": {"memory_fraction": 1.5}},
            "inference_engine_config.memory_fraction=1.5: Input should be less than or equal to 1",
        ),
    ],
)
def test_a_refusal_names_field_value_and_what_is_allowed(given, sentence):
    with pytest.raises(ConfigError) as refusal:
        resolve("model", **given)
    assert sentence in str(refusal.value)


def test_all_mistakes_are_told_at_once():
    with pytest.raises(ConfigError, match=r"^tensor_parallel=0: .*; slurm\.mem='x': .*; port_number=-1: "):
        resolve("model", tensor_parallel=0, slurm={"mem": "x"}, port_number=-1)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"tensor_paralel": 2}, "unknown keyword 'tensor_paralel': did you mean 'tensor_parallel'?"),
        ({"model_config": {"replicas": 2}}, "unknown field 'replicas': did you mean 'replica_num'?"),
        ({"mii_config": {"deployment": "x"}}, "unknown field 'deployment': did you mean 'deployment_name'?"),
        ({"slurm": {"partion": "gpu"}}, "unknown field 'slurm.partion': did you mean 'partition' or 'python'?"),
        (
            {"mii_config": {"model_config": {"inference_engine_config": {"thread": 1}}}},
            "unknown field 'inference_engine_config.thread': did you mean 'threads'?",
        ),
    ],
)
def test_an_unknown_name_is_answered_with_the_closest(arguments, sentence):
    with pytest.raises(ConfigError) as refusal:
        resolve("model", **arguments)
    assert str(refusal.value) == sentence


def test_a_name_like_no_other_is_answered_with_all():
    with pytest.raises(ConfigError, match=r"unknown field 'slurm.zzz': valid are account, constraint, .*, time$"):
        resolve("model", slurm={"zzz": 1})


def test_a_model_is_needed_except_by_the_echo_engine():
    with pytest.raises(ConfigError, match=r"^model_name_or_path='': name a model folder"):
        resolve()
    assert resolve(inference_engine_config={"engine": "echo"}).deployment_name == "echo"


def test_deepspeed_miis_restful_api_is_the_gateway():
    config = resolve("model", enable_restful_api=True, restful_api_port=51080)
    assert (config.gateway, config.gateway_port) == (True, 51080)


@pytest.mark.parametrize("name", sorted({**SUPERSEDED_MODEL_FIELDS, **SUPERSEDED_MII_FIELDS}))
def test_deepspeed_miis_other_fields_warn_and_are_dropped(name):
    says = {**SUPERSEDED_MODEL_FIELDS, **SUPERSEDED_MII_FIELDS}[name]
    with pytest.warns(MIIWarning) as caught:
        config = resolve("model", **{name: "anything"})
    assert [str(warning.message) for warning in caught] == [f"'{name}' has no effect here: {says}"]
    assert config == resolve("model")


def test_nothing_warns_without_cause():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve("model", tensor_parallel=2, slurm={"partition": "gpu"})
        resolve("model", **SILENT)
    assert SILENT.keys() <= SUPERSEDED_MODEL_FIELDS.keys() | SUPERSEDED_MII_FIELDS.keys()


def test_deepspeeds_engine_configuration_is_read():
    theirs = {
        "tensor_parallel": {"tp_size": 4},
        "state_manager": {
            "max_ragged_batch_size": 700,
            "max_ragged_sequence_count": 50,
            "max_context": 4096,
            "memory_config": {"mode": "allocate", "size": 100},
            "offload": False,
        },
        "quantization": {"quantization_mode": "wf6af16"},
        "page_size": 16,
    }
    with pytest.warns(MIIWarning) as caught:
        engine = resolve("m", inference_engine_config=theirs).model_conf.inference_engine_config
    assert engine == EngineConfig(max_batch_tokens=700, max_batch_size=50, page_size=16)
    warned = sorted(str(warning.message) for warning in caught)
    assert [text.partition(" has ")[0] for text in warned] == [
        "'inference_engine_config.max_context'",
        "'inference_engine_config.memory_config'",
        "'inference_engine_config.quantization'",
    ]
    assert "num_blocks" in warned[1]


def test_deepspeeds_engine_configuration_may_be_an_object():
    class Manager(BaseModel):
        max_ragged_batch_size: int = 768
        max_tracked_sequences: int = 2048

    class Theirs(BaseModel):  # as RaggedInferenceEngineConfig, which loads torch
        tensor_parallel: dict[str, int] = {}
        state_manager: Manager = Manager()

    made = resolve("m", inference_engine_config=Theirs(state_manager=Manager(max_ragged_batch_size=256)))
    assert made.model_conf.inference_engine_config == EngineConfig(max_batch_tokens=256)
    assert resolve("m", inference_engine_config=Theirs()) == resolve("m")


def test_what_deepspeed_mii_calls_things():
    assert mii_hpc.MIIConfig is mii_hpc.config.MIIConfig
    made = resolve("m", task=mii_hpc.TaskType.TEXT_GENERATION, deployment_type=mii_hpc.DeploymentType.LOCAL)
    assert made == resolve("m", task="text-generation")
    assert made.model_conf.task == "text-generation" and made.model_conf.task.value == "text-generation"
    with pytest.raises(mii_hpc.errors.UnknownArgument):
        resolve("m", unknown_kwarg=True)
    with pytest.raises(mii_hpc.UnknownArgument):
        resolve("m", model_config={"unknown": True})
    with pytest.raises(ConfigError) as caught:
        resolve("m", model_config={"unknown": True, "tensor_parallel": 0})
    assert not isinstance(caught.value, mii_hpc.UnknownArgument)


@pytest.mark.parametrize("spelling", ["bf16", "torch.bfloat16", "bfloat16"])
def test_spellings_of_a_dtype(spelling):
    assert resolve("model", dtype=spelling).model_conf.dtype == "bfloat16"


def test_a_yaml_file(tmp_path):
    file = tmp_path / "deployment.yaml"
    file.write_text(
        "deployment_name: chat\nmodel_config:\n  model_name_or_path: m\n  tensor_parallel: 2\n"
        'slurm:\n  partition: gpu\n  time: 90\n  extra: {"mail-type": FAIL}\n'
    )
    config = resolve(mii_config=file)
    assert config == resolve(mii_config=str(file))
    assert (config.deployment_name, config.model_conf.tensor_parallel) == ("chat", 2)
    assert (config.slurm.time, config.slurm.extra) == ("90", {"mail-type": "FAIL"})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "not a readable YAML file"),
        ("a: [", "not a readable YAML file"),
        ("- a\n- b\n", "must hold fields of MIIConfig"),
        ("", "must hold fields of MIIConfig"),
    ],
)
def test_a_file_that_is_no_deployment(tmp_path, text, says):
    file = tmp_path / "x.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=rf"^mii_config='{file}': .*{says}"):
        resolve("model", mii_config=file)


@pytest.mark.parametrize("argument", ["mii_config", "model_config"])
def test_an_argument_of_another_kind_is_refused(argument):
    with pytest.raises(ConfigError, match=f"^{argument}=3: "):
        resolve("model", **{argument: 3})


def test_arguments_win_over_a_file(tmp_path):
    file = tmp_path / "deployment.yaml"
    file.write_text(
        "deployment_name: from-file\nport_number: 1234\n"
        "model_config: {model_name_or_path: a, tensor_parallel: 2, replica_num: 2, dtype: float16}\n"
    )
    config = resolve("b", {"tensor_parallel": 4}, file, replica_num=8, deployment_name="from-keyword")
    model = config.model_conf
    assert (model.model_name_or_path, model.dtype, model.tensor_parallel, model.replica_num) == ("b", "float16", 4, 8)
    assert (config.deployment_name, config.port_number) == ("from-keyword", 1234)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"model_config": {"model_name_or_path": "other"}}, "model_name_or_path='model': another argument says "),
        ({"mii_config": {"model_config": {"model_name_or_path": "other"}}}, "model_name_or_path='model': another "),
        ({"mii_config": MIIConfig(model_config={"model_name_or_path": "other"})}, "says model_name_or_path='other'; "),
        ({"model_config": {"tensor_parallel": 2}, "tensor_parallel": 4}, "tensor_parallel=4: another argument says "),
        (
            {"mii_config": {"model_config": {"dtype": "fp16"}, "model_conf": {"dtype": "fp32"}}},
            "dtype='fp32': another ",
        ),
        ({"mii_config": {"port_number": 1}, "port_number": 2}, "port_number=2: another argument says port_number=1"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(arguments, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        resolve("model", **arguments)


def test_arguments_may_say_the_same_twice():
    said = resolve("m", {"model_name_or_path": "m"}, {"port_number": 1}, port_number=1)
    assert said == resolve("m", port_number=1)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("facebook/opt-125m-mii-deployment", "facebook-opt-125m-mii-deployment"),
        ("my model (new)", "my-model-new-"),
        ("../up", "up"),
        (".hidden", "hidden"),
        ("a\n", "a-"),
    ],
)
def test_a_name_that_is_no_file_name_gets_dashes(given, name):
    assert resolve("model", deployment_name=given).deployment_name == name


def test_objects_are_as_good_as_dictionaries():
    made = resolve(
        model_config=ModelConfig(model_name_or_path="m", tensor_parallel=2),
        mii_config=MIIConfig(port_number=7),
        slurm=SlurmConfig(partition="gpu"),
    )
    assert made == resolve("m", tensor_parallel=2, port_number=7, slurm={"partition": "gpu"})


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("mistralai/Mistral-7B-v0.1", "Mistral-7B-v0.1"),
        ("/models/my model (new)/", "my-model-new-"),
        ("/models/.hidden", "hidden"),
        ("x" * 150, "x" * 100),
        ("ü", "model"),
    ],
)
def test_the_default_name_is_made_from_the_models(model, name):
    assert resolve(model).deployment_name == name


def test_a_configuration_survives_json():
    config = resolve(
        "m",
        tensor_parallel=2,
        inference_engine_config={"num_blocks": 64},
        slurm={"setup": ["module load x"], "extra": {"a": 1, "b": True, "c": "d"}, "time": 5},
        queue_timeout=3,
        home="~/deployments",
    )
    text = config.model_dump_json()
    assert MIIConfig.model_validate_json(text) == config
    assert json.loads(text)["model_conf"]["tensor_parallel"] == 2


def test_the_home_is_absolute_and_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MII_HPC_HOME", "relative")
    monkeypatch.chdir(tmp_path)
    assert MIIConfig().home == tmp_path / "relative"
    monkeypatch.delenv("MII_HPC_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_home().expanduser() == MIIConfig().home == tmp_path / ".mii_hpc"


def test_configurations_are_frozen():
    with pytest.raises(ValueError, match=r"frozen"):
        resolve("m").deployment_name = "other"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_length": 0}, "max_length=0: "),
        ({"max_length": 2**31}, "max_length=2147483648: "),
        ({"max_new_tokens": 0}, "max_new_tokens=0: "),
        ({"min_new_tokens": -1}, "min_new_tokens=-1: "),
        ({"temperature": -0.1}, "temperature=-0.1: Input should be greater than or equal to 0"),
        ({"temperature": float("inf")}, "temperature=inf: "),
        ({"top_p": 0}, "top_p=0: "),
        ({"top_p": 1.01}, "top_p=1.01: "),
        ({"top_k": 0}, "top_k=0: "),
        ({"repetition_penalty": 0}, "repetition_penalty=0: "),
        ({"seed": -1}, "seed=-1: "),
        ({"seed": 2**63}, "seed=9223372036854775808: "),
        ({"num_return_sequences": 65}, "num_return_sequences=65: "),
        ({"stop": ""}, "stop='': a stop string has 1 to 1024 characters"),
        ({"stop": ["a"] * 65}, "at most 64"),
        ({"stop": "a" * 1025}, "one here has 1025"),
        ({"stop": [1]}, "stop.0=1: "),
        ({"stop": ["a" * 1024] * 2, "num_return_sequences": 33}, "its strings have 67584 characters for"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens=5 exceeds max_new_tokens=4"),
        ({"num_return_sequences": 2, "do_sample": False}, "needs do_sample=True"),
        ({"num_return_sequences": 2, "temperature": 0}, "needs do_sample=True and a temperature"),
        ({"max_tokens": 5}, "unknown field 'max_tokens': did you mean 'max_new_tokens'"),
        (
            {"structured_outputs": {}},
            "structured_outputs: give one of json, json_object, regex, choice, grammar, not none",
        ),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "not regex and choice"),
        ({"structured_outputs": {"jsn": {}}}, "structured_outputs: unknown field 'jsn': did you mean 'json'"),
        ({"structured_outputs": ["a"]}, "must be a dictionary with one of json, "),
        ({"structured_outputs": "json"}, "structured_outputs='json': must be a dictionary, or one as JSON: "),
        ({"structured_outputs": {"json": []}}, "json must be a JSON schema, as a dictionary or as JSON, not []"),
        ({"structured_outputs": {"json": "{"}}, "json is not to be written as JSON: EOF"),
        ({"structured_outputs": {"json": {"a": {1}}}}, "json is not to be written as JSON: "),
        ({"structured_outputs": {"regex": ""}}, "regex must be a string that is not empty, not ''"),
        ({"structured_outputs": {"regex": "\ud800"}}, "regex is not to be written as JSON: "),
        ({"structured_outputs": {"choice": []}}, "choice must be a list of one or more strings, not []"),
        ({"structured_outputs": {"choice": "ab"}}, "choice must be a list of one or more strings, not 'ab'"),
        ({"structured_outputs": {"grammar": "é" * 2**15}}, "grammar has 65551 bytes as JSON, and 65536 are allowed"),
    ],
)
def test_options_of_a_request_have_ranges(options, sentence):
    with pytest.raises(InvalidRequestError) as refusal:
        validate(GenerateParamsConfig, options)
    assert sentence in str(refusal.value)


def test_the_ends_of_the_ranges_are_allowed():
    validate(
        GenerateParamsConfig,
        {"max_length": 2**31 - 1, "seed": 2**63 - 1, "top_p": 1, "temperature": 100, "stop": ["a" * 1024] * 64},
    )
    params = validate(GenerateParamsConfig, {"stop": "one", "seed": 0, "min_new_tokens": 4, "max_new_tokens": 4})
    assert params.stop == ("one",)


@pytest.mark.parametrize("schema", [{"type": "object"}, '{"type": "object"}'])
def test_what_answers_are_held_to_is_json(schema):
    wanted = {"structured_outputs": {"json": schema, "regex": None, "json_object": False}}
    held = validate(GenerateParamsConfig, wanted).structured_outputs
    assert held == '{"json": {"type": "object"}}'
    for same in (held, {"json_object": True}):
        assert validate(GenerateParamsConfig, {"structured_outputs": same}).structured_outputs == held


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("time", "soon", 'must be minutes, "H:MM:SS" or "D-HH:MM:SS"'),
        ("mem", "much", 'must be a number with a unit, such as "64G"'),
    ],
)
def test_what_slurm_would_misread_is_answered_with_how_to_write_it(field, value, allowed):
    with pytest.raises(ConfigError) as caught:
        resolve("m", slurm={field: value})
    assert str(caught.value) == f"slurm.{field}='{value}': {allowed}"


@pytest.mark.parametrize(
    ("walltime", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("8:00:00", 28800),
        ("2-0", 172800),
        ("1-2:30", 95400),
        ("1-02:30:05", 95405),
    ],
)
def test_a_walltime_in_seconds(walltime, seconds):
    assert seconds_of(walltime) == seconds


def test_a_handover_is_shorter_than_the_walltime():
    assert resolve("m", uptime="7-0", slurm={"time": "8:00:00"}).handover == 600
    assert resolve("m", slurm={"time": "5"}).uptime is None
    with pytest.raises(ConfigError, match=r"^handover=600: must be less than slurm.time='5', 300 seconds$"):
        resolve("m", uptime="7-0", slurm={"time": "5"})
    with pytest.raises(ConfigError, match=r"^uptime='soon': must be minutes"):
        resolve("m", uptime="soon")
