"""Compiled layers: on CUDA as the engine uses them, and else around the attention kernel in Triton's interpreter."""

import os
import sys
import threading

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from mii_hpc.engine import compiled  # noqa: E402
from mii_hpc.engine.attention.interface import attach, measure_layers  # noqa: E402
from mii_hpc.engine.blocks import PagedCache  # noqa: E402
from mii_hpc.engine.fusing import fuse  # noqa: E402
from tests.engine.collect import make, running, submit  # noqa: E402
from tests.engine.interpreter import CUDA, DEVICE, runs_kernels  # noqa: E402
from tests.engine.reference import PROMPTS, Reference  # noqa: E402
from tests.models import CONTEXT, tiny_model  # noqa: E402

pytestmark = pytest.mark.engine


@runs_kernels
@pytest.mark.parametrize(("architecture", "kinds"), [("llama", 1), ("gemma3_text", 2)])
def test_layers_of_a_kind_are_compiled_once_for_all_numbers_of_sequences(tmp_path, monkeypatch, architecture, kinds):
    from transformers import AutoModelForCausalLM

    from mii_hpc.engine.attention.triton import TritonAttention

    graphs = []

    def backend(graph, inputs):
        fuse(graph)
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(compiled, "_backend", backend)
    changes = {"gemma3_text": {"sliding_window": 24, "head_dim": 16}}.get(architecture, {})
    layers = ["sliding_attention", "sliding_attention", "full_attention"]
    changes |= {"layer_types": layers} if architecture == "gemma3_text" else {}
    folder = tiny_model(tmp_path, architecture, num_hidden_layers=3, **changes)
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE).eval()
    cache = PagedCache(measure_layers(module, DEVICE, CONTEXT), 20, 8, DEVICE)
    attention = TritonAttention(cache)
    attach(module, attention)
    layered = compiled.CompiledLayers(module)

    @torch.inference_mode()
    def logits(size):
        tables = torch.arange(1, 2 * size + 1, dtype=torch.int32, device=DEVICE).view(size, 2)
        lengths = torch.arange(1, size + 1, dtype=torch.int32, device=DEVICE)
        attention.prepare_decode(tables[:, 0] * 8 + lengths - 1, tables, lengths)
        ids = torch.arange(size, device=DEVICE)[None]
        return module(input_ids=ids, position_ids=lengths.long()[None] - 1, use_cache=False).logits

    for size in (2, 7, 5, 1, 6):  # first as many sequences as each has blocks
        plain = logits(size)
        with layered.used(size):
            assert torch.allclose(logits(size), plain, atol=1e-5)
    # One for a single sequence, and one for all other numbers.
    assert len(graphs) == 2 * kinds
    for graph in graphs:
        (attention,) = (node for node in graph.graph.nodes if "paged_attention" in str(node.target))
        assert "cos" in attention.kwargs
        # Else torch would make everything anew at each start.
        assert all("example_value" in node.args[0].meta for node in graph.graph.nodes if node.op == "call_method")


@pytest.mark.skipif(not CUDA, reason="only decode steps on CUDA are compiled")
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_an_engine_that_compiles_gives_generates_own_answers(tmp_path, caplog, architecture):
    folder = str(tiny_model(tmp_path, architecture))
    reference = Reference(folder)
    config = {"max_batch_size": 11, "max_batch_tokens": 64, "page_size": 8, "compile": True}
    with running(make(model_name_or_path=folder, inference_engine_config=config)) as engine:
        answers = [submit(engine, prompt, do_sample=False, max_new_tokens=30) for prompt in PROMPTS * 2]
        for prompt, answer in zip(PROMPTS * 2, answers, strict=True):
            assert answer.wait().token_ids() == reference.greedy(prompt, max_new_tokens=30)
    assert not [record for record in caplog.records if "torch.compile" in record.message]


@pytest.mark.parametrize(("wanted", "imported"), [(True, ["torch._inductor.compile_fx"]), (False, [])])
def test_the_compiler_is_imported_beside_what_is_done_meanwhile(monkeypatch, wanted, imported):
    names, threads, interval = [], [], sys.getswitchinterval()

    def import_module(name):
        names.append(name)
        threads.append(threading.current_thread())

    monkeypatch.setattr(compiled.importlib, "import_module", import_module)
    with compiled.compiler_imported(wanted):
        pass
    assert names == imported
    assert threading.current_thread() not in threads
    assert sys.getswitchinterval() == interval


def test_a_compiler_that_cannot_be_imported_is_missed_where_it_is_used(monkeypatch):
    def import_module(name):
        raise ImportError(name)

    monkeypatch.setattr(compiled.importlib, "import_module", import_module)
    with compiled.compiler_imported(True):
        pass


@pytest.mark.parametrize("chosen", [None, "torch's own", "a user's own"])
def test_what_is_compiled_is_kept_where_no_other_user_can_put_anything(monkeypatch, tmp_path, chosen):
    from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

    monkeypatch.setattr(compiled, "extensions_folder", lambda: tmp_path)
    folder = {"torch's own": default_cache_dir(), "a user's own": str(tmp_path / "mine")}.get(chosen)
    if folder is None:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    else:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", folder)
    with compiled._compiler():
        assert cache_dir() == str(tmp_path / ("mine" if chosen == "a user's own" else "inductor"))
    assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == folder


def test_an_error_does_not_wait_for_the_import_of_the_compiler(monkeypatch):
    imported = threading.Event()
    monkeypatch.setattr(compiled.importlib, "import_module", lambda name: imported.wait(60))
    with pytest.raises(ValueError, match="the model"), compiled.compiler_imported(True):
        raise ValueError("the model")
    assert not imported.is_set()
    imported.set()
