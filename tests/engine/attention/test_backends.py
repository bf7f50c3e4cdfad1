"""What every attention back end does, compared with a dense computation in double precision."""

import random

import pytest

torch = pytest.importorskip("torch")

from mii_hpc.engine.attention import create_backend  # noqa: E402
from mii_hpc.engine.blocks import LayerShape, PagedCache  # noqa: E402
from mii_hpc.engine.step import Slice, Step  # noqa: E402
from mii_hpc.errors import ConfigError  # noqa: E402

pytestmark = pytest.mark.engine
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAGE, BLOCKS, LAYERS = 8, 64, 2
KEY_HEADS, KEY_SIZE, VALUE_SIZE = 2, 20, 36
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
# (tokens in the cache, new tokens): decodes first, the shortest of them first.
MIXED = [(0, 1), (7, 1), (8, 1), (40, 1), (0, 13), (16, 9), (30, 3)]
DECODES = [(0, 1), (7, 1), (15, 1), (62, 1)]
OPTIONS = [
    {},
    {"scaling": 0.3},
    {"window": 1},
    {"window": 11},
    {"softcap": 2.0},
    {"sinks": True},
    {"window": 11, "softcap": 2.0, "sinks": True, "scaling": 0.3},
]


@pytest.fixture(params=["gather", "auto"])
def name(request):
    return request.param


class Sequences:
    """Random keys and values of sequences, those of the tokens before a step in the cache already."""

    def __init__(self, sequences, dtype=torch.float32, heads=6):
        self.draw = torch.Generator().manual_seed(0)
        shape = LayerShape((KEY_HEADS, KEY_SIZE), (KEY_HEADS, VALUE_SIZE), dtype)
        self.cache = PagedCache([shape] * LAYERS, BLOCKS, PAGE, DEVICE)
        free = random.Random(0).sample(range(1, BLOCKS), BLOCKS - 1)
        self.keys, self.values, self.queries, slices = [], [], [], []
        for start, new in sequences:
            end = start + new
            blocks = tuple(free.pop() for _ in range(-(-end // PAGE)))
            slices.append(Slice(start, tuple(range(new)), blocks, True))
            self.keys.append(self.random(LAYERS, end, KEY_HEADS, KEY_SIZE, dtype=dtype))
            self.values.append(self.random(LAYERS, end, KEY_HEADS, VALUE_SIZE, dtype=dtype))
            self.queries.append(self.random(LAYERS, new, heads, KEY_SIZE, dtype=dtype))
            for token in range(start):
                for layer in range(LAYERS):
                    self.cache.keys[layer][blocks[token // PAGE], token % PAGE] = self.keys[-1][layer, token]
                    self.cache.values[layer][blocks[token // PAGE], token % PAGE] = self.values[-1][layer, token]
        self.step = Step.of(tuple(slices))
        self.sinks = self.random(heads, dtype=dtype)

    def random(self, *shape, dtype):
        return torch.randn(*shape, generator=self.draw).to(DEVICE, dtype)

    def attend(self, backend, layer, sinks=False, **options):
        key, value = (
            torch.cat([one[layer, part.start :] for one, part in zip(tensors, self.step.slices, strict=True)])
            for tensors in (self.keys, self.values)
        )
        query = torch.cat([queries[layer] for queries in self.queries])
        return backend.layer(layer)(query, key, value, sinks=self.sinks if sinks else None, **options)

    def expected(self, layer, scaling=None, window=None, softcap=None, sinks=False):
        outputs = []
        for keys, values, queries in zip(self.keys, self.values, self.queries, strict=True):
            query, key, value = (one[layer].double().transpose(0, 1) for one in (queries, keys, values))
            shared = query.shape[0] // KEY_HEADS
            key, value = key.repeat_interleave(shared, 0), value.repeat_interleave(shared, 0)
            scores = query @ key.transpose(1, 2) * (KEY_SIZE**-0.5 if scaling is None else scaling)
            if softcap:
                scores = softcap * (scores / softcap).tanh()
            position = torch.arange(key.shape[1], device=DEVICE)
            own = position[-query.shape[1] :, None]
            seen = (position <= own) & (position > own - (window or key.shape[1]))
            scores = scores.masked_fill(~seen, -torch.inf)
            if sinks:
                column = self.sinks.double()[:, None, None].expand(-1, query.shape[1], 1)
                scores = torch.cat([scores, column], -1)
            outputs.append((scores.softmax(-1)[..., : key.shape[1]] @ value).transpose(0, 1))
        return torch.cat(outputs)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", OPTIONS)
def test_decodes_and_chunks_of_one_step(name, options, dtype):
    sequences = Sequences(MIXED, dtype)
    backend = create_backend(name, sequences.cache)
    backend.prepare(sequences.step)
    for layer in range(LAYERS):
        output = sequences.attend(backend, layer, **options)
        assert output.dtype == dtype
        assert torch.allclose(output.double(), sequences.expected(layer, **options), atol=TOLERANCE[dtype])


@pytest.mark.parametrize("options", OPTIONS)
def test_decodes_that_are_laid_out_on_the_device(name, options):
    sequences = Sequences(DECODES)
    backend = create_backend(name, sequences.cache)
    starts = [part.start for part in sequences.step.slices]
    tables = [[*part.blocks, *[0] * 9][:9] for part in sequences.step.slices]
    slots = [table[start // PAGE] * PAGE + start % PAGE for table, start in zip(tables, starts, strict=True)]
    lengths = [start + 1 for start in starts]
    backend.prepare_decode(*(torch.tensor(numbers, device=DEVICE) for numbers in (slots, tables, lengths)))
    for layer in range(LAYERS):
        output = sequences.attend(backend, layer, **options)
        assert torch.allclose(output.double(), sequences.expected(layer, **options), atol=1e-5)


def test_every_query_head_may_have_a_key_head(name):
    sequences = Sequences(MIXED, heads=KEY_HEADS)
    backend = create_backend(name, sequences.cache)
    backend.prepare(sequences.step)
    assert torch.allclose(sequences.attend(backend, 1).double(), sequences.expected(1), atol=1e-5)


def test_a_token_sees_what_another_slice_of_the_same_step_writes(name):
    sequences = Sequences([(16, 1), (0, 20)])
    first, second = sequences.step.slices
    # As a sequence that shares the first two blocks of the other.
    step = Step.of((Slice(16, first.token_ids, (*second.blocks[:2], first.blocks[2]), True), second))
    for tensors in (sequences.keys, sequences.values):
        tensors[0][:, :16] = tensors[1][:, :16]
    backend = create_backend(name, sequences.cache)
    backend.prepare(step)
    assert torch.allclose(sequences.attend(backend, 0).double(), sequences.expected(0), atol=1e-5)


def test_attending_leaves_torchs_choice_of_kernels_as_it_is(name):
    sequences = Sequences(MIXED)
    backend = create_backend(name, sequences.cache)
    backend.prepare(sequences.step)
    for allowed in (False, True):  # True is torch's own
        torch.backends.cuda.enable_cudnn_sdp(allowed)
        sequences.attend(backend, 0)
        assert torch.backends.cuda.cudnn_sdp_enabled() == allowed


def test_a_backend_that_does_not_work_here_is_refused():
    shape = LayerShape((2, 16), (2, 16), torch.float16)
    cache = PagedCache([shape], BLOCKS, PAGE, DEVICE)
    with pytest.raises(ConfigError, match="attention='cpu': takes a CPU, a C"):
        create_backend("cpu", cache)
