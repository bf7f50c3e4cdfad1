"""Sums in memory that ranks share: here that of processes on a CPU, through Triton's interpreter.

On GPUs the tests of tensor parallelism take them.
"""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from mii_hpc.engine.model import peers  # noqa: E402
from tests.engine.interpreter import CUDA, runs_kernels  # noqa: E402

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

RANKS = 3
# Of one program and of several, of one line each and of several, with and without a rest.
SIZES = (2, 126, 256, 300, 2 * peers.WORDS * 4, 2, 254)
SECONDS = 240


def rows_of(rank, number, dtype):
    draw = torch.Generator().manual_seed(100 * number + rank)
    return torch.randn(SIZES[number], generator=draw).to(dtype)


def add_up_as_rank(rank, memories, dtype, results):
    peers.PROGRAMS = 2  # fewer than the largest sum wants, so that each takes several lines
    mine = peers.Peers(memories[rank], [memory.data_ptr() for memory in memories])
    sums = []
    for number in range(len(SIZES)):
        rows = rows_of(rank, number, dtype)
        residual = rows_of(RANKS, number, dtype) if number % 2 else None  # the same on all ranks
        peers.add_up(rows, mine.addresses, mine.counts, rank, residual)
        sums.append(rows)
    results.put((rank, [each.view(torch.uint8).tolist() for each in sums]))


# Rows, outputs and inputs of products, each by another kernel or by several programs, with and without a rest.
PRODUCTS = ((1, 70, 144), (3, 70, 144), (17, 66, 144), (1, 6, 48), (40, 70, 48), (64, 64, 48))


def factors_of(rank, number):
    count, outputs, inputs = PRODUCTS[number]
    draw = torch.Generator().manual_seed(100 * number + rank)
    rows = torch.randn(count, inputs, generator=draw).half()
    residual = torch.randn(count, outputs, generator=draw).half()
    return rows, (torch.randn(outputs, inputs, generator=draw) / inputs**0.5).half(), residual


def multiply_as_rank(rank, memories, results):
    from mii_hpc.engine.model import products

    mine = peers.Peers(memories[rank], [memory.data_ptr() for memory in memories])
    got = []
    for number in range(len(PRODUCTS)):
        rows, weight, _ = factors_of(rank, number)
        residual = factors_of(RANKS, number)[2] if number % 2 else None
        sums = products.Sums(mine.addresses, mine.counts, rank)
        got.append(products.multiply(rows, weight, sums=sums, residual=residual))
        other = torch.full((300,), float(rank)).half()  # sums of both kinds take turns
        peers.add_up(other, mine.addresses, mine.counts, rank)
        got.append(other)
    results.put((rank, [each.tolist() for each in got]))


@runs_kernels
@pytest.mark.skipif(CUDA, reason="on GPUs the tests of tensor parallelism take such sums")
def test_all_ranks_have_the_same_sum_of_products():
    got = on_all_ranks(multiply_as_rank)
    for number in range(len(PRODUCTS)):
        products = [
            rows.double() @ weight.double().T for rows, weight, _ in (factors_of(r, number) for r in range(RANKS))
        ]
        expected = sum(products) + (factors_of(RANKS, number)[2].double() if number % 2 else 0)
        for rank in range(RANKS):
            assert got[rank][2 * number] == got[0][2 * number]
            assert got[rank][2 * number + 1] == [float(sum(range(RANKS)))] * 300
        torch.testing.assert_close(torch.tensor(got[0][2 * number]).double(), expected, rtol=0, atol=1e-2)


def on_all_ranks(run, *arguments):
    """Run a function in a process for each rank; return what each puts into the queue."""
    context = torch.multiprocessing.get_context("spawn")
    memories = [torch.zeros(peers.memory_size(RANKS), dtype=torch.int64).share_memory_() for _ in range(RANKS)]
    results = context.Queue()
    arguments = (memories, *arguments, results)
    ranks = [context.Process(target=run, args=(rank, *arguments), daemon=True) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    results = dict(results.get(timeout=SECONDS) for _ in ranks)
    for process in ranks:
        process.join(SECONDS)
    return results


@runs_kernels
@pytest.mark.skipif(CUDA, reason="on GPUs the tests of tensor parallelism take such sums")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_all_ranks_have_the_same_sum(dtype, monkeypatch):
    monkeypatch.setattr(peers, "PROGRAMS", 2)
    sums = on_all_ranks(add_up_as_rank, dtype)
    for number in range(len(SIZES)):
        expected = sum(rows_of(rank, number, dtype).float() for rank in range(RANKS + number % 2)).to(dtype)
        for rank in range(RANKS):
            got = torch.tensor(sums[rank][number], dtype=torch.uint8).view(dtype)
            assert torch.equal(got, expected), (rank, number)


def test_no_memory_is_shared_where_nccl_is_told_that_gpus_do_not_reach_it(monkeypatch):
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    with pytest.raises(RuntimeError, match="NCCL_P2P_DISABLE"):
        peers.room(2, torch.device("cpu"))


def test_small_sums_are_those_that_its_memory_holds():
    largest = 2 * peers.PROGRAMS * peers.LINES * peers.WORDS
    assert peers.is_small(torch.empty(largest, dtype=torch.bfloat16, device="meta"), 2)
    assert not peers.is_small(torch.empty(largest + 2, dtype=torch.bfloat16, device="meta"), 2)
    assert peers.is_small(torch.empty(largest // 4, dtype=torch.bfloat16, device="meta"), 4)
    assert not peers.is_small(torch.empty(largest // 2, dtype=torch.bfloat16, device="meta"), 4)
    assert not peers.is_small(torch.empty(3, dtype=torch.bfloat16), 2)
    assert not peers.is_small(torch.empty(0, dtype=torch.bfloat16), 2)
    assert not peers.is_small(torch.empty(4, dtype=torch.float64), 2)
    assert not peers.is_small(torch.empty(4, dtype=torch.int32), 2)
