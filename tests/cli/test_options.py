import pytest
from pydantic import BaseModel

from mii_hpc.cli.ask import OPTIONS
from mii_hpc.cli.options import assignment, merged, nested, options_of, put
from mii_hpc.cli.serve import FIELDS
from mii_hpc.config import GenerateParamsConfig
from mii_hpc.errors import ConfigError


def leaves(model):
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation)
        else:
            yield name


def test_every_field_is_an_option_and_no_two_have_one_name():
    from mii_hpc.config import MIIConfig

    names = [option.name for option in FIELDS]
    assert sorted(names) == sorted(set(names))
    assert {*names, "model_name_or_path"} == set(leaves(MIIConfig))
    assert {option.name for option in OPTIONS} | {"stream"} == set(GenerateParamsConfig.model_fields)


def test_what_is_given_is_nested_like_the_fields():
    given = dict.fromkeys((option.name for option in FIELDS), None)
    given |= {"time": "8:00:00", "wait": False, "extra": ["mail-type=FAIL", "no-requeue=true"], "max_batch_size": "4"}
    assert nested(FIELDS, given) == {
        "slurm": {"time": "8:00:00", "extra": {"mail-type": "FAIL", "no-requeue": True}},
        "wait": False,
        "model_conf": {"inference_engine_config": {"max_batch_size": "4"}},
    }


def test_the_upper_of_two_mappings_counts():
    below = {"slurm": {"partition": "cpu", "mem": "1G"}, "wait": True}
    assert merged(below, {"slurm": {"partition": "gpu"}}) == {"slurm": {"partition": "gpu", "mem": "1G"}, "wait": True}
    assert below["slurm"]["partition"] == "cpu"


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("slurm.time=8:00:00", ("slurm", "time"), "8:00:00"),
        ("wait=false", ("wait",), False),
        ('slurm.setup=["a", "b=c"]', ("slurm", "setup"), ["a", "b=c"]),
        ("slurm.python=a=b", ("slurm", "python"), "a=b"),
    ],
)
def test_an_assignment(text, path, value):
    assert assignment("--set", text) == (path, value)


@pytest.mark.parametrize("text", ["wait", "=true"])
def test_an_assignment_needs_a_name_and_a_value(text):
    with pytest.raises(ConfigError, match=r"--set .*must be NAME=VALUE"):
        assignment("--set", text)


def test_nothing_is_put_into_what_is_no_mapping():
    with pytest.raises(ConfigError, match=r"slurm\.time='8': has no field 'hours'"):
        put({"slurm": {"time": "8"}}, ("slurm", "time", "hours"), 1)


def test_the_help_says_what_a_field_is_for_and_its_default(run):
    shown = {option.name: option for option in options_of(GenerateParamsConfig, {GenerateParamsConfig: ""})}
    assert shown["top_p"].parameter.annotation.__metadata__[0].help.endswith("[default: 0.9]")
    assert "KV cache" in run("serve", "--help").output
