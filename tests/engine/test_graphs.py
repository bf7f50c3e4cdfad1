import logging
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch")

from mii_hpc.engine import runner  # noqa: E402
from mii_hpc.engine.blocks import NULL_BLOCK  # noqa: E402
from mii_hpc.engine.graphs import DecodeGraphs, bucket, sequence_buckets  # noqa: E402
from mii_hpc.engine.step import Slice, Step  # noqa: E402
from mii_hpc.errors import InvalidRequestError  # noqa: E402
from tests.engine.collect import make, running, submit  # noqa: E402
from tests.engine.reference import PROMPTS, Reference, option_sets, tokenizer_of  # noqa: E402
from tests.models import tiny_model  # noqa: E402
from tests.waiting import PATIENCE  # noqa: E402

pytestmark = pytest.mark.engine
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
SMALL = {"max_batch_size": 11, "max_batch_tokens": 64, "page_size": 8}
# Shorter than the texts, where the architecture has a window; in the last, one of two layers has it.
WINDOWS = {
    "mistral": {"sliding_window": 24},
    "gemma3_text": {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16},
}


def test_sequences_come_in_few_sizes_that_waste_little():
    assert sequence_buckets(64) == [1, 2, 4, 8, 16, 24, 32, 48, 64]
    assert sequence_buckets(11) == [1, 2, 4, 8, 11]
    assert sequence_buckets(1) == [1]
    assert len(sequence_buckets(256)) == 13
    for largest in range(1, 300):
        buckets = sequence_buckets(largest)
        assert buckets[-1] == largest
        for size in range(1, largest + 1):
            assert size <= bucket(size, buckets) < 2 * size


class Emulated(DecodeGraphs):
    """Computes again where a graph would be replayed: all but the capture is as on CUDA."""

    @staticmethod
    def work_on(device, attention):
        return True

    def _record(self, compute):
        compute()
        return compute


@pytest.fixture
def use(monkeypatch):
    """Have engines make such graphs from now on; gives the list of those made."""

    def use(kind):
        made = []

        class Noted(kind):
            def __init__(self, forward, attention, cache, *rest):
                super().__init__(forward, attention, cache, *rest)
                self.cache = cache
                self.replayed = set()
                made.append(self)

            def run(self, step):
                logits = super().run(step)
                if logits is not None:
                    self.replayed.add(bucket(len(step.slices), self.sizes))
                return logits

        monkeypatch.setattr(runner, "DecodeGraphs", Noted)
        return made

    return use


@pytest.mark.parametrize("attention", ["auto", "gather"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "opt", "gemma3_text"])
def test_padded_steps_give_generates_own_answers(tmp_path, use, architecture, attention):
    made = use(Emulated)
    folder = str(tiny_model(tmp_path, architecture, **WINDOWS.get(architecture, {})))
    reference = Reference(folder)
    config = {**SMALL, "attention": attention}
    engine, answers = make(model_name_or_path=folder, inference_engine_config=config), []
    # Each ends at another time, so that the batch gets smaller while the texts get longer.
    options = [{"do_sample": False, "max_new_tokens": 10 + 9 * number} for number in range(10)]
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(10)]

    def ask():
        answers.extend(submit(engine, prompt, **chosen) for prompt, chosen in zip(prompts, options, strict=True))
        # Prompts are tokenised one after the other: when this one is refused, all of them are ready.
        with pytest.raises(InvalidRequestError):
            submit(engine, "x" * 10_000).wait()

    with running(engine, ask):
        for prompt, chosen, answer in zip(prompts, options, answers, strict=True):
            assert answer.wait().token_ids() == reference.greedy(prompt, **chosen)
        (graphs,) = made
        assert graphs.sizes == [1, 2, 4, 8, 11]
        assert graphs.replayed == {1, 2, 4, 8, 11}
        assert graphs.cache.keys[0][NULL_BLOCK].count_nonzero() == 0


def test_a_seed_gives_the_same_text_with_graphs_and_without(tmp_path, use):
    made = use(Emulated)
    folder = str(tiny_model(tmp_path))
    requests = option_sets()[::2]
    texts = []
    for replayed in (True, False):
        config = {**SMALL, "cuda_graphs": replayed}
        with running(make(model_name_or_path=folder, inference_engine_config=config)) as engine:
            answers = [submit(engine, prompt, **options) for prompt, options in requests]
            texts.append([answer.wait().token_ids() for answer in answers])
    assert texts[0] == texts[1]
    assert len(made) == 1
    assert made[0].replayed


def test_other_steps_are_none_for_a_graph(tmp_path, use):
    made = use(Emulated)
    folder = str(tiny_model(tmp_path))
    with running(make(model_name_or_path=folder, inference_engine_config=SMALL)):
        (graphs,) = made
        single = Slice(start=3, token_ids=(5,), blocks=(1,), sample=True)
        assert graphs.run(Step.of((single,))).shape == (1, 512)
        assert graphs.run(Step.of((single, Slice(0, (5, 6), (2,), sample=True)))) is None
        assert graphs.run(Step.of((Slice(3, (5,), (1,), sample=False),))) is None
        assert graphs.run(Step.of()) is None


def test_numbers_that_are_not_finite_do_no_harm_to_others(tmp_path, use):
    from safetensors.torch import load_file, save_file

    folder = tiny_model(tmp_path)
    weights = load_file(folder / "model.safetensors")
    for token in (0, 70):  # of the padding, and of a prompt
        weights["model.embed_tokens.weight"][token] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    options = {"do_sample": False, "ignore_eos": True, "repetition_penalty": 1.5}
    made = use(Emulated)
    bad = tokenizer_of(folder).decode([70])
    config = {**SMALL, "attention": "gather"}
    with running(make(model_name_or_path=str(folder), inference_engine_config=config)) as engine:
        for _ in range(3):
            good = [submit(engine, "A!", max_new_tokens=20 + number, **options) for number in range(3)]
            poison = submit(engine, bad)
            assert poison.done.wait(PATIENCE)
            assert "finite" in str(poison.error)
            for number, answer in enumerate(good):
                assert len(answer.wait().token_ids()) == 20 + number
        assert made[0].replayed


class Failing(Emulated):
    attempts = 0

    def _record(self, compute):
        self.attempts += 1
        raise RuntimeError("operation not permitted when stream is capturing")


def test_a_capture_that_fails_is_told_once_and_no_request_notices(tmp_path, caplog, use):
    made = use(Failing)
    folder = str(tiny_model(tmp_path))
    reference = Reference(folder)
    with (
        caplog.at_level(logging.WARNING, "mii_hpc"),
        running(make(model_name_or_path=folder, inference_engine_config=SMALL)) as engine,
    ):
        for prompt in PROMPTS:
            answer = submit(engine, prompt, do_sample=False, max_new_tokens=12).wait()
            assert answer.token_ids() == reference.greedy(prompt, max_new_tokens=12)
        assert made[0].attempts == 1
    assert [record.message for record in caplog.records if "CUDA graphs" in record.message] == [
        "decode steps run without CUDA graphs, several times slower: operation not permitted when stream is capturing"
    ]


def test_eight_ranks_have_graphs_together_or_none(caplog):
    """Each rank a thread, on a device that only seems to capture; one cannot capture for four sequences."""
    ranks = 8
    met = threading.Barrier(ranks, timeout=PATIENCE)
    votes = [True] * ranks

    def sizes(rank, fails):
        class Rank(Emulated):
            def _record(self, compute):
                if rank == 5 and len(self._graphs) == fails:
                    raise RuntimeError("out of memory")
                return compute

        def agree(own):
            votes[rank] = own
            met.wait()
            all_can = all(votes)
            met.wait()  # before anybody votes again
            return all_can

        cache = types.SimpleNamespace(page_size=16, scratch_slot=0, device=torch.device("cpu"))
        graphs = Rank(None, None, cache, torch.zeros(17), 64, agree)
        graphs.capture(lambda sentence: None)
        return graphs.sizes

    with ThreadPoolExecutor(ranks) as threads, caplog.at_level(logging.WARNING, "mii_hpc"):
        assert list(threads.map(sizes, range(ranks), [-1] * ranks)) == [[1, 2, 4, 8, 16]] * ranks
        assert not caplog.records
        assert list(threads.map(sizes, range(ranks), [2] * ranks)) == [[]] * ranks
    reasons = sorted(record.args[0] for record in caplog.records)
    assert reasons == ["another rank of the replica cannot capture them"] * 7 + ["out of memory"]


def test_there_are_graphs_where_cuda_is(tmp_path, use):
    made = use(DecodeGraphs)
    with running(make(model_name_or_path=str(tiny_model(tmp_path)))):
        assert len(made) == torch.cuda.is_available()


@cuda
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral", "opt", "gpt_neox", "gemma3_text"])
def test_graphs_give_generates_own_answers(tmp_path, use, architecture):
    folder = str(tiny_model(tmp_path, architecture, **WINDOWS.get(architecture, {})))
    reference = Reference(folder)
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(10)]
    for wanted in (True, False):
        made = use(DecodeGraphs)
        config = {**SMALL, "cuda_graphs": wanted}
        with running(make(model_name_or_path=folder, inference_engine_config=config)) as engine:
            for _ in range(2):  # captured, then replayed from the start
                answers = [
                    submit(engine, prompt, do_sample=False, max_new_tokens=10 + 9 * number)
                    for number, prompt in enumerate(prompts)
                ]
                for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
                    assert answer.wait().token_ids() == reference.greedy(prompt, max_new_tokens=10 + 9 * number)
            assert len(made) == wanted
            if wanted:
                assert len(made[0].replayed) >= 5


@cuda
def test_graphs_give_the_same_samples(tmp_path):
    folder = str(tiny_model(tmp_path))
    requests = option_sets()
    texts = []
    for wanted in (True, False):
        config = {"max_batch_size": 64, "page_size": 8, "max_batch_tokens": 128, "cuda_graphs": wanted}
        with running(make(model_name_or_path=folder, inference_engine_config=config)) as engine:
            answers = [submit(engine, prompt, **options) for prompt, options in requests]
            texts.append([answer.wait().token_ids() for answer in answers])
    assert texts[0] == texts[1]


@cuda
def test_a_model_that_cannot_be_captured_is_served_all_the_same(tmp_path, caplog, monkeypatch):
    folder = str(tiny_model(tmp_path))
    reference = Reference(folder)
    load = runner.attach

    def attach(module, backend):
        module.model.norm.register_forward_hook(lambda module, args, output: output * float(output.isnan().sum() + 1))
        load(module, backend)

    monkeypatch.setattr(runner, "attach", attach)
    with (
        caplog.at_level(logging.WARNING, "mii_hpc"),
        running(make(model_name_or_path=folder, inference_engine_config=SMALL)) as engine,
    ):
        for _ in range(2):
            answers = [submit(engine, prompt, do_sample=False, max_new_tokens=20) for prompt in PROMPTS]
            for prompt, answer in zip(PROMPTS, answers, strict=True):
                assert answer.wait().token_ids() == reference.greedy(prompt, max_new_tokens=20)
    assert sum("CUDA graphs" in record.message for record in caplog.records) == 1
