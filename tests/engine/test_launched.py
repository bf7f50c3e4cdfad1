"""A script that torchrun has started on two ranks, as DeepSpeed's launcher does on GPUs."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("torch")

import mii_hpc as mii
from tests.engine.reference import PROMPTS, Reference
from tests.models import tiny_model

GREEDY = {"do_sample": False, "max_new_tokens": 12}

SCRIPT = """
import json, os, sys
import mii_hpc as mii
from mii_hpc.engine import runner

model, prompts, options, folder = json.loads(sys.argv[1])
before = dict(os.environ)
said, models, load = {}, [], runner.load_model


def note(*arguments):
    models.append(load(*arguments))
    return models[-1]


runner.load_model = note
pipe = mii.pipeline(model, inference_engine_config={"page_size": 8, "max_batch_tokens": 64})
said["rank 0"] = pipe.is_rank_0
said["environment is kept"] = dict(os.environ) == before
said["weights"] = models[0].weights
said["answers"] = [list(answer.token_ids) for answer in pipe(prompts, **options)]
try:
    pipe("x" * 10_000)
except mii.InvalidRequestError as error:
    said["error"] = str(error)
said["pieces"] = len(list(pipe.stream("x", ignore_eos=True, **options)))
pipe.destroy()

# Scripts end without a word; the third argument is DeepSpeed-MII's.
pipe = mii.pipeline(model, None, True)
said["everywhere"] = [list(answer.token_ids) for answer in pipe(prompts, **options)]
said["streamed"] = "".join(map(str, pipe.stream(prompts[0], **options)))
open(os.path.join(folder, os.environ["RANK"]), "w").write(json.dumps(said))
"""


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_launched_ranks_share_one_model_and_rank_0_answers(tmp_path, models):
    folder = str(tiny_model(tmp_path / "model"))
    reference = Reference(folder)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*launcher, script, json.dumps([folder, PROMPTS, GREEDY, str(tmp_path)])],
        capture_output=True, text=True, timeout=500, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "has failed" not in done.stderr
    first, second = (json.loads((tmp_path / rank).read_text()) for rank in "01")
    expected = [reference.greedy(prompt, max_new_tokens=12) for prompt in PROMPTS]
    assert (first["rank 0"], second["rank 0"]) == (True, False)
    assert first["answers"] == first["everywhere"] == second["everywhere"] == expected
    assert second["answers"] == []
    assert (first["pieces"], second["pieces"]) == (12, 0)
    assert first["streamed"] == second["streamed"] == reference.decode(expected[0])
    assert "the prompt has 10000 bytes, and " in first["error"] and first["error"] == second["error"]
    assert first["environment is kept"] and second["environment is kept"]
    with mii.pipeline(folder):
        whole = models[0].weights
    assert first["weights"] < 0.75 * whole and second["weights"] < 0.75 * whole


def test_a_pipeline_takes_all_ranks_of_its_launcher(monkeypatch):
    with pytest.raises(mii.ConfigError, match=r"tensor_parallel=2: .*here is 1; .* `torchrun --nproc-per-node 2`"):
        mii.pipeline("model", tensor_parallel=2)
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(mii.ConfigError, match=r"tensor_parallel=2: .*here is 4;"):
        mii.pipeline("model", tensor_parallel=2)
