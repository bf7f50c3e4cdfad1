from pathlib import Path

import pytest

pytest.importorskip("torch")

from tests.engine.pair import Replica
from tests.models import checkpoint_files, tiny_model

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
SMALL = {"max_batch_size": 64, "max_batch_tokens": 64, "page_size": 8}


def test_no_rank_takes_more_memory_than_its_shard_and_one_file(tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "num_attention_heads": 16}
    folder = tiny_model(tmp_path, files=7, dtype="bfloat16", **sizes)
    files = [(folder / name).stat().st_size for name in checkpoint_files(folder)]
    assert len(files) == 8
    assert sum(files) > 300 * 2**20
    with Replica(model_name_or_path=str(folder), inference_engine_config={**SMALL, "num_blocks": 16}) as replica:
        assert replica.ready() is None
        ((_, token_ids, _),) = replica.answers([("a", {"max_new_tokens": 2, "ignore_eos": True})])
        assert len(token_ids) == 2
        for process in replica.processes:
            # Whoever overwrites the checkpoint must not change, or kill, what is served.
            assert ".safetensors" not in Path(f"/proc/{process.pid}/maps").read_text()
    assert [process.exitcode for process in replica.processes] == [0, 0]
    # The peak of all resident pages, from the first read of the model until the rank's end: the weights, plain and
    # packed, whatever is made on the way, what malloc keeps though it is free, and the files' pages while mapped.
    for grown in replica.grown:
        assert grown <= 1.15 * (sum(files) / 2 + max(files)), (grown, files)
