"""Compares the kernels with a dense reference: on CUDA where it is, and else, fewer shapes, in Triton's interpreter."""

from dataclasses import dataclass, replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from mii_hpc.engine.step import Slice, Step  # noqa: E402
from tests.engine.interpreter import CUDA, DEVICE, runs_kernels  # noqa: E402

pytestmark = [pytest.mark.engine, runs_kernels]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture
def kernels():
    """The module under test."""
    from mii_hpc.engine.attention import triton

    return triton


@dataclass(frozen=True)
class Case:
    """Sequences as (tokens in the cache, new tokens); None is a row that only fills up a batch of decodes."""

    sequences: tuple
    heads: int = 4
    key_heads: int = 2
    key_size: int = 64
    value_size: int = 64
    page: int = 16
    dtype: torch.dtype = torch.float32
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    splits: int = 1
    rotary: int = 0

    @property
    def decode(self):
        return all(one is None or one[1] == 1 for one in self.sequences)


DECODES = ((0, 1), (40, 1), (15, 1), (149, 1))
CHUNKS = ((0, 37), (21, 19))
MIXED = ((5, 1), (0, 40), (130, 1), (70, 3), (33, 33))
HALF, BRAIN = torch.float16, torch.bfloat16

# Every path through the kernels once, for the interpreter, whose products of bfloat16 are wrong.
FEW = {
    "decode": Case(DECODES),
    "decode, split": Case(DECODES, splits=5),
    "decode, one key head per head": Case(DECODES, 3, 3, splits=2),
    "decode, one key head": Case(DECODES, 8, 1, splits=3),
    "decode, window": Case(DECODES, window=20, splits=3),
    "decode, window of one": Case(DECODES, window=1, splits=3),
    "decode, softcap and sinks": Case(DECODES, softcap=1.5, sinks=True, splits=3),
    "decode, padded": Case((*DECODES, None, None), splits=3),
    "decode, odd sizes": Case(DECODES, 5, 1, 80, 33, page=7, splits=3),
    "decode, blocks of keys that the new one begins": Case(((31, 1), (32, 1), (64, 1), (96, 1)), splits=2),
    "decode, half": Case(DECODES, dtype=HALF, page=64, splits=2),
    "decode, rotated": Case(DECODES, rotary=64),
    "decode, rotated, odd sizes": Case((*DECODES, None), 5, 1, 80, 33, page=7, splits=3, rotary=80),
    "decode, rotated in part": Case(DECODES, 8, 2, 40, 32, dtype=HALF, window=20, sinks=True, splits=2, rotary=12),
    "chunks": Case(CHUNKS),
    "chunks, window": Case(CHUNKS, 2, 1, window=20, page=32),
    "chunks, softcap and sinks": Case(CHUNKS, softcap=1.5, sinks=True),
    "chunks, odd sizes": Case(CHUNKS, 6, 2, 20, 40, page=13, dtype=HALF),
    "mixed": Case(MIXED, 2, 1, 32, 32),
    "mixed, rotated": Case(MIXED, 2, 1, 32, 32, rotary=32),
    "mixed, rotated in part": Case(MIXED, 2, 1, 32, 32, dtype=HALF, rotary=20),
    "mixed, split": Case(MIXED, 7, 1, 32, 32, splits=4),
    "mixed, split, window and sinks": Case(MIXED, 2, 1, 32, 32, splits=4, window=50, sinks=True),
}
LONG_DECODES = ((0, 1), (127, 1), (128, 1), (2000, 1), (511, 1), (63, 1))
LONG_MIXED = ((900, 1), (0, 300), (64, 64), (33, 1), (700, 200), (10, 2), (0, 1))
ALL = (
    FEW
    | {
        f"{name}, {heads}/{key_heads} x {size}, page {page}, {str(dtype)[6:]}": Case(
            sequences, heads, key_heads, size, size, page, dtype, splits=splits
        )
        for name, sequences, splits in (
            ("decodes", LONG_DECODES, 1),
            ("decodes, split", LONG_DECODES, 16),
            ("chunks", ((0, 300), (64, 64), (700, 200)), 1),
            ("mixed, split", LONG_MIXED, 8),
        )
        for heads, key_heads, size, page, dtype in (
            (32, 8, 128, 32, BRAIN),
            (8, 8, 64, 16, HALF),
            (16, 2, 80, 32, BRAIN),
            (7, 1, 256, 64, BRAIN),
            (8, 2, 256, 256, HALF),
            (71, 1, 64, 32, BRAIN),
            (6, 2, 96, 32, HALF),
            (8, 1, 128, 128, torch.float32),
            (4, 2, 256, 16, torch.float32),
            (12, 4, 192, 48, BRAIN),
        )
    }
    | {
        f"{name}, {dtype}, {change}": replace(Case(sequences, 8, 2, 128, 128, 32, dtype, splits=8), **change)
        for name, sequences in (("decodes", LONG_DECODES), ("mixed", LONG_MIXED))
        for dtype in (BRAIN, torch.float32)
        for change in (
            {"window": 100},
            {"softcap": 5.0},
            {"sinks": True},
            {"window": 128, "sinks": True, "heads": 64, "key_heads": 8, "key_size": 64, "value_size": 64},
            {"key_size": 192},
            {"rotary": 128},
            {"key_size": 256, "rotary": 64},
            {"heads": 71, "key_heads": 1, "key_size": 64, "rotary": 64},
            {"heads": 3, "key_heads": 3, "key_size": 80, "rotary": 80},
            {"key_size": 112, "value_size": 160},
            {"key_size": 120, "value_size": 120, "page": 20},
        )
    }
)
CASES = ALL if CUDA else FEW


class Scene:
    """A step of a case, and what it should give. Whatever nobody may read is not a number."""

    def __init__(self, case, kernels):
        draw = torch.Generator().manual_seed(0)
        totals = [0 if one is None else sum(one) for one in case.sequences]
        widths = [-(-total // case.page) for total in totals]
        blocks = torch.randperm(sum(widths) + 3, generator=draw).tolist()
        tables = [[blocks.pop() for _ in range(width)] for width in widths]
        self.scratch = blocks.pop() * case.page

        def rows(heads, size):
            return torch.randn(sum(totals), heads, size, generator=draw).to(case.dtype)

        key, value = rows(case.key_heads, case.key_size), rows(case.key_heads, case.value_size)
        cache = torch.full((sum(widths) + 3, case.page, case.key_heads, 1), torch.nan, dtype=case.dtype)
        keys, values = cache.repeat(1, 1, 1, case.key_size), cache.repeat(1, 1, 1, case.value_size)
        sinks = torch.randn(case.heads, generator=draw) if case.sinks else None
        angles = torch.randn(sum(totals), case.rotary, generator=draw)
        cos, sin = angles.cos().to(case.dtype), angles.sin().to(case.dtype)
        turned = rotated(key, cos, sin)
        query, expected, new, slots, starts, row = [], [], [], [], [0], 0
        for one, total, table in zip(case.sequences, totals, tables, strict=True):
            context, count = one or (0, 1)
            own = slice(row, row + total)
            query.append(torch.randn(count, case.heads, case.key_size, generator=draw).to(case.dtype))
            slot = [table[place // case.page] * case.page + place % case.page for place in range(total)]
            keys.view(-1, *keys.shape[2:])[slot[:context]] = key[own][:context]
            values.view(-1, *values.shape[2:])[slot[:context]] = value[own][:context]
            new += range(row + context, row + total) if one else [0]
            slots += slot[context:] if one else [self.scratch]
            starts.append(starts[-1] + count)
            seen = torch.cat([key[own][:context], turned[own][context:]])
            now = new[len(new) - count :]
            expected.append(dense(case, rotated(query[-1], cos[now], sin[now]), seen, value[own], sinks))
            row += total
        width = max(widths) + 2
        padded = torch.tensor([table + [10**6] * (width - len(table)) for table in tables])
        self.query, self.key, self.value = torch.cat(query).to(DEVICE), key[new].to(DEVICE), value[new].to(DEVICE)
        self.keys, self.values = keys.to(DEVICE), values.to(DEVICE)
        self.sinks = None if sinks is None else sinks.to(DEVICE)
        self.cos, self.sin = (part[new].to(DEVICE) if case.rotary else None for part in (cos, sin))
        self.turned_key = turned[new].to(DEVICE)
        self.expected = torch.cat(expected).to(DEVICE)
        self.slots = torch.tensor(slots, device=DEVICE)
        integers = torch.int32
        self.batch = kernels.Batch(
            self.slots,
            torch.tensor(totals, device=DEVICE, dtype=integers),
            padded.to(DEVICE, integers),
            None if case.decode else torch.tensor(starts, device=DEVICE, dtype=integers),
        )


def rotated(rows, cos, sin):
    """Rows [tokens, heads, size] with the position embeddings of transformers' Llama, in double precision."""
    size = cos.shape[1]
    turned = rows[..., :size].double()
    half = torch.cat([-turned[..., size // 2 :], turned[..., : size // 2]], -1)
    turned = turned * cos[:, None] + half * sin[:, None]
    return torch.cat([turned.to(rows.dtype), rows[..., size:]], -1)


def dense(case, query, key, value, sinks):
    """Attention of the last tokens of one sequence, in double precision."""
    total, new = len(key), len(query)
    if total == 0:
        return torch.zeros(new, case.heads, case.value_size, dtype=torch.double)
    group = case.heads // case.key_heads
    key, value = (part.double().repeat_interleave(group, 1) for part in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.double(), key) * 0.3
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    place, own = torch.arange(total), torch.arange(total - new, total)[:, None]
    hidden = (place > own) | (place <= own - (case.window or total))
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, new, 1)], 2)
    weights = scores.softmax(2)[:, :, :total]
    return torch.einsum("hqk,khd->qhd", weights, value)


def assert_close(output, scene, case):
    assert output.dtype == case.dtype
    torch.testing.assert_close(output.double(), scene.expected, rtol=0, atol=TOLERANCE[case.dtype])


def attend(kernels, scene, case):
    plan = kernels.Plan.of(scene.query, scene.values, len(case.sequences), case.key_heads, case.decode, False)
    plan = plan._replace(splits=case.splits)
    output = torch.full((*scene.query.shape[:2], case.value_size), torch.nan, dtype=case.dtype, device=DEVICE)
    kernels.attend(
        scene.query,
        scene.key,
        scene.value,
        scene.keys,
        scene.values,
        output,
        scene.batch,
        0.3,
        case.window,
        case.softcap,
        scene.sinks,
        scene.cos,
        scene.sin,
        plan,
    )
    return output


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_attends_as_the_dense_reference(kernels, case):
    scene = Scene(case, kernels)
    assert_close(attend(kernels, scene, case), scene, case)
    written = [row for row, one in enumerate(scene.slots.tolist()) if one != scene.scratch]
    new_keys, new_values = (cache.flatten(0, 1)[scene.slots.long()[written]] for cache in (scene.keys, scene.values))
    assert torch.equal(new_values, scene.value[written])
    if case.rotary:
        torch.testing.assert_close(new_keys, scene.turned_key[written])
    else:
        assert torch.equal(new_keys, scene.key[written])


@pytest.mark.parametrize(("page", "splits", "window"), [(7, 1, None), (16, 9, 20), (32, 2, 1), (64, 3, None)])
def test_a_decode_step_reads_only_what_was_in_the_cache_before(kernels, page, splits, window):
    sequences = ((0, 1), (31, 1), (32, 1), (33, 1), (64, 1), (101, 1), None)
    case = Case(sequences, 4, 2, 32, 24, page, window=window, sinks=page == 16, splits=splits)
    scene = Scene(case, kernels)
    count = len(sequences)
    # What is new goes where no block table leads. Its place by the table stays not a number.
    spare = -(-count // page)
    before = [torch.cat([cache, torch.full_like(cache[:spare], torch.nan)]) for cache in (scene.keys, scene.values)]
    scene.keys, scene.values = (cache.clone() for cache in before)
    scene.batch.slots = len(before[0]) * page - 1 - torch.arange(count, device=DEVICE)
    assert_close(attend(kernels, scene, case), scene, case)
    for old, cache, new in zip(before, (scene.keys, scene.values), (scene.key, scene.value), strict=True):
        expected = old.clone()
        expected.flatten(0, 1)[scene.batch.slots[:-1]] = new[:-1]  # the last row only fills up
        torch.testing.assert_close(cache, expected, rtol=0, atol=0, equal_nan=True)


def test_an_uploaded_step_is_what_the_kernels_read(kernels):
    step = Step.of((Slice(start=9, token_ids=(5,), blocks=(7, 3, 8), sample=True), Slice(2, (1, 2, 3), (4, 6), True)))
    batch = kernels.Batch.of(step, 4, DEVICE)
    assert batch.slots.tolist() == [8 * 4 + 1, 4 * 4 + 2, 4 * 4 + 3, 6 * 4]
    assert batch.lengths.tolist() == [10, 5]
    assert batch.query_starts.tolist() == [0, 1, 4]
    assert batch.tables[0].tolist() == [7, 3, 8]
    assert batch.tables[1, :2].tolist() == [4, 6]
    assert batch.split
    assert kernels.Batch.of(Step.of(step.slices[:1]), 4, DEVICE).query_starts is None
    assert not kernels.Batch.of(Step.of(step.slices[1:]), 4, DEVICE).split


@pytest.mark.parametrize("name", ["decode, split", "decode, rotated", "mixed", "mixed, rotated"])
def test_the_operation_writes_and_attends_also_when_compiled_around(kernels, name):
    case = FEW[name]

    def compute(scene):
        batch = scene.batch
        tensors = (scene.query, scene.key, scene.value, scene.keys, scene.values)
        places = (scene.slots, batch.lengths, batch.tables, batch.query_starts)
        return kernels.paged_attention(*tensors, *places, scaling=0.3, cos=scene.cos, sin=scene.sin) * 1

    plain, compiled = Scene(case, kernels), Scene(case, kernels)
    assert_close(compute(plain), plain, case)
    backend = "inductor" if CUDA else "aot_eager"
    assert_close(torch.compile(compute, backend=backend, fullgraph=True)(compiled), compiled, case)
    assert torch.equal(plain.keys.nan_to_num(), compiled.keys.nan_to_num())


def test_few_sequences_share_their_keys_among_many_programs(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "kernel_limits", lambda device: (132, 227 * 2**10))

    def plan(sequences, dtype=torch.bfloat16, size=128, group=4, decode=True):
        query, values = torch.empty(1, 8 * group, size, dtype=dtype), torch.empty(1, 32, 8, size, dtype=dtype)
        return kernels.Plan.of(query, values, sequences, 8, decode, split=True)

    assert [plan(sequences).splits for sequences in (1, 16, 64, 256)] == [32, 5, 2, 1]
    assert plan(1, group=71).rows == 128
    for dtype in TOLERANCE:
        for size in (64, 80, 128, 192, 256):
            for decode in (True, False):
                one = plan(1, dtype, size, 8, decode)
                assert (one.rows + 2 * one.columns) * size * dtype.itemsize <= 227 * 2**10
