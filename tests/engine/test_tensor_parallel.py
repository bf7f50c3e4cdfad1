import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

from mii_hpc.generation import ResumedAnswer
from tests.engine.pair import Replica
from tests.engine.reference import PROMPTS, Reference, option_sets
from tests.models import checkpoint_files, tiny_model

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
SMALL = {"max_batch_size": 64, "max_batch_tokens": 64, "page_size": 8}


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("qwen2", {"tie_word_embeddings": True}),
        ("mistral", {"sliding_window": 24}),
        ("opt", {}),
        ("gpt_neox", {}),
        ("phi3", {}),
        ("mixtral", {"num_local_experts": 4}),
        ("llama", {"num_key_value_heads": 1}),
    ],
)
def test_greedy_answers_are_generates_own(tmp_path, architecture, changes):
    folder = str(tiny_model(tmp_path, architecture, files=3, **changes))
    reference = Reference(folder)
    with Replica(model_name_or_path=folder, inference_engine_config=SMALL) as replica:
        assert replica.ready() is None
        answers = replica.answers([(p, {"do_sample": False, "max_new_tokens": 30}) for p in PROMPTS])
    for prompt, (text, token_ids, _) in zip(PROMPTS, answers, strict=True):
        assert token_ids == reference.greedy(prompt, max_new_tokens=30)
        assert text == reference.decode(token_ids)
    assert [process.exitcode for process in replica.processes] == [0, 0]


@pytest.mark.parametrize("ranks", [4, 8])
def test_more_ranks_give_the_same_greedy_answers(request, tmp_path, ranks):
    """As on one host of four or eight GPUs; two heads of keys and values, which several ranks then share."""
    if ranks == 8 and not request.config.getoption("--families"):
        pytest.skip("eight ranks start for a minute on two cores: with --families")
    folder = str(tiny_model(tmp_path, num_attention_heads=8, num_key_value_heads=2))
    reference = Reference(folder)
    with Replica(ranks, model_name_or_path=folder, inference_engine_config=SMALL) as replica:
        assert replica.ready() is None
        answers = replica.answers([(p, {"do_sample": False, "max_new_tokens": 30}) for p in PROMPTS])
    assert [token_ids for _, token_ids, _ in answers] == [reference.greedy(p, max_new_tokens=30) for p in PROMPTS]


def test_64_option_sets_in_one_batch(tmp_path):
    folder = tiny_model(tmp_path, files=4)
    assert len(checkpoint_files(folder)) > 1
    path = Path(folder) / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [1, *range(60, 80)]}))
    reference = Reference(str(folder))
    requests = option_sets()
    with Replica(model_name_or_path=str(folder), inference_engine_config=SMALL) as replica:
        assert replica.ready() is None
        together = replica.answers(requests)
        alone = [replica.answers([request])[0] for request in requests[::7]]
        cuts = [number * len(token_ids) // 64 for number, (_, token_ids, _) in enumerate(together)]
        resumed = replica.answers(
            [
                (prompt, {**options, "resume": (ResumedAnswer(tuple(token_ids[:cut]), 0),)})
                for (prompt, options), (_, token_ids, _), cut in zip(requests, together, cuts, strict=True)
            ]
        )
        poisoned = replica.answers([("x" * 10_000, {}), ("fine", {"do_sample": False, "max_new_tokens": 4})])
    for (prompt, options), (_, token_ids, _) in zip(requests, together, strict=True):
        if not options.get("do_sample", True):
            assert token_ids == reference.greedy(prompt, **options), options
    assert alone == together[::7]
    assert resumed == [(text, token_ids[cut:], why) for (text, token_ids, why), cut in zip(together, cuts, strict=True)]
    assert "InvalidRequestError" in poisoned[0]
    assert poisoned[1][1] == reference.greedy("fine", max_new_tokens=4)
    assert [process.exitcode for process in replica.processes] == [0, 0]


def test_ranks_that_are_killed_leave_no_shared_memory(tmp_path):
    with Replica(model_name_or_path=str(tiny_model(tmp_path)), inference_engine_config=SMALL) as replica:
        assert replica.ready() is None
        for process in replica.processes:
            process.kill()
    assert not list(Path("/dev/shm").glob(f"*_{replica.port}_*"))
