"""Sums over the GPUs of one host: each rank writes its rows into the memory of the others, in one kernel.

A sum has a kernel of its own, or is taken at the end of that of a product, tile by tile.
Every 4 bytes of data travel with a number that changes from sum to sum, in one write of 8 bytes. Who waits for them
sees by the number that they are there, so that no rank waits for another before or after ("LL", the low-latency
protocol of NCCL). All ranks add up in the order of the ranks, in float32: their sums are equal to the last bit.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import triton
import triton.language as tl

from mii_hpc.engine.overlap import follow, launch_options

WORDS = 128
"""A program sends so many words of 4 bytes at a time. It is one warp, which waits without a barrier."""
PROGRAMS = 1024
"""So many programs at most. They begin in their order, so the first that waits has all that it waits for running."""
LINES = 4
"""A program sends so many times `WORDS` at most."""
ROOM = 1024
"""A program has room for so many words: those of a tile of a product, which may be more than its lines."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALVES = 2
"""Sums take turns in so many halves of the memory. A rank that sends the sum after the next has read that one of all
others, who therefore are done with the first."""


class Peers:
    """The memory in which the ranks of a group on one host leave rows for each other.

    Attributes:
        addresses: [ranks], where each rank's memory begins, as this rank's GPU sees it.
        counts: [PROGRAMS], how many sums each program has taken.
    """

    def __init__(self, memory: torch.Tensor, addresses: list[int]) -> None:
        """Use this rank's memory, `memory_size` numbers of 64 bits that are zero, and that of the others."""
        self._memory = memory
        self.addresses = torch.tensor(addresses, dtype=torch.int64, device=memory.device)
        self.counts = torch.zeros(PROGRAMS, dtype=torch.int32, device=memory.device)

    @classmethod
    def meet(cls, memory: torch.Tensor, group: dist.ProcessGroup) -> Peers:
        """Share what `room` gives with the other ranks of a group; on all at once, which are to agree before a sum.

        Raises RuntimeError where a GPU does not reach another one's memory.
        """
        import torch.distributed._symmetric_memory as symmetric_memory

        handle = symmetric_memory.rendezvous(memory, group)
        return cls(memory, [handle.get_buffer(rank, (1,), torch.int64).data_ptr() for rank in range(group.size())])


def room(ranks: int, device: torch.device) -> torch.Tensor:
    """Return memory that can be shared among so many ranks.

    Raises RuntimeError where there is none, or NCCL is told that GPUs do not reach each other's.
    """
    import torch.distributed._symmetric_memory as symmetric_memory

    if os.environ.get("NCCL_P2P_DISABLE", "0") != "0":
        raise RuntimeError("NCCL_P2P_DISABLE is set")

    memory = symmetric_memory.empty(memory_size(ranks), dtype=torch.int64, device=device)
    memory.zero_()
    torch.cuda.synchronize(device)
    return memory


def memory_size(ranks: int) -> int:
    """Return how many numbers of 64 bits a rank's memory has."""
    return HALVES * ranks * PROGRAMS * ROOM


def is_small(rows: torch.Tensor, ranks: int) -> bool:
    """Return whether a sum is faster in this way than by NCCL: each rank sends all of it to every other one."""
    size = rows.numel() * rows.element_size()
    return rows.dtype in DTYPES and size % 4 == 0 and 0 < size <= 4 * PROGRAMS * LINES * WORDS // (ranks - 1)


def add_up(
    rows: torch.Tensor,
    addresses: torch.Tensor,
    counts: torch.Tensor,
    rank: int,
    residual: torch.Tensor | None = None,
) -> None:
    """Add the other ranks' rows to these, which are contiguous and small, and a residual that is alike."""
    words = rows.view(-1).view(torch.int32)
    added = words if residual is None else residual.contiguous().view(-1).view(torch.int32)
    programs = min(triton.cdiv(len(words), WORDS), PROGRAMS)
    lines = triton.cdiv(len(words), programs * WORDS)
    _sum_kernel[(programs,)](
        rows.view(-1), words, added, addresses, counts, len(words),
        RANK=rank, RANKS=len(addresses), LINES=lines, ROOM=ROOM, MOST=PROGRAMS, WORDS=WORDS, HALVES=HALVES,
        PAIRS=rows.element_size() == 2, ADDED=residual is not None, num_warps=1, **launch_options(rows.device),
    )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def _sum_kernel(
    rows: tl.tensor,
    words: tl.tensor,
    added: tl.tensor,
    addresses: tl.tensor,
    counts: tl.tensor,
    count: tl.tensor,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    LINES: tl.constexpr,
    ROOM: tl.constexpr,
    MOST: tl.constexpr,
    WORDS: tl.constexpr,
    HALVES: tl.constexpr,
    PAIRS: tl.constexpr,
    ADDED: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    follow(EARLY)
    program = tl.program_id(0)
    number = tl.load(counts + program) + 1
    # What this program has in a rank's memory, of this half, from a rank: its lines.
    half = (number & (HALVES - 1)) * RANKS
    column = tl.arange(0, WORDS)
    for line in tl.static_range(LINES):
        index = (line * tl.num_programs(0) + program) * WORDS + column
        word = tl.load(words + index, mask=index < count, other=0)
        sent = (number.to(tl.int64) << 32) | (word.to(tl.int64) & 0xFFFFFFFF)
        place = ((half + RANK) * MOST + program) * ROOM + line * WORDS + column
        for peer in tl.static_range(RANKS):
            if peer != RANK:
                memory = tl.load(addresses + peer).to(tl.pointer_type(tl.int64))
                tl.store(memory + place, sent)  # one instruction of 8 bytes, which hardware does not split
    memory = tl.load(addresses + RANK).to(tl.pointer_type(tl.int64))
    for line in tl.static_range(LINES):
        index = (line * tl.num_programs(0) + program) * WORDS + column
        own = tl.load(words + index, mask=index < count, other=0)
        first = tl.zeros([WORDS], tl.float32)
        second = tl.zeros([WORDS], tl.float32)
        for peer in tl.static_range(RANKS):
            word = own
            if peer != RANK:
                place = ((half + peer) * MOST + program) * ROOM + line * WORDS + column
                received = tl.load(memory + place, volatile=True)
                while tl.max(((received >> 32).to(tl.int32) != number).to(tl.int32), 0) > 0:
                    received = tl.load(memory + place, volatile=True)
                word = received.to(tl.int32)
            first, second = _add_word(first, second, word, rows.dtype.element_ty, PAIRS)
        if ADDED:
            word = tl.load(added + index, mask=index < count, other=0)
            first, second = _add_word(first, second, word, rows.dtype.element_ty, PAIRS)
        if PAIRS:
            word = _word(first, second, rows.dtype.element_ty)
            tl.store(words + index, word, mask=index < count)
        else:
            tl.store(words + index, first.to(tl.int32, bitcast=True), mask=index < count)
    tl.store(counts + program, number)


@triton.jit
def sum_of_tile(
    tile: tl.tensor,
    count: tl.tensor,
    addresses: tl.tensor,
    counts: tl.tensor,
    dtype: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    MOST: tl.constexpr,
    ROOM: tl.constexpr,
    HALVES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    THREADS: tl.constexpr,
) -> tl.tensor:
    """Add up what the programs of this number of all ranks have: [ROWS, COLUMNS], of which `count` rows are real.

    It travels as numbers of 16 bits, two in a word, of which there is room for ROOM.
    """
    WIDTH: tl.constexpr = COLUMNS // 2
    first, second = tl.split(tl.reshape(tile, [ROWS, WIDTH, 2]))
    own = _word(first, second, dtype)
    program = tl.program_id(0)
    number = tl.load(counts + program) + 1
    half = (number & (HALVES - 1)) * RANKS
    row = tl.arange(0, ROWS)[:, None]
    index = row * WIDTH + tl.arange(0, WIDTH)[None, :]
    real = (row < count) & (index >= 0)
    sent = (number.to(tl.int64) << 32) | (own.to(tl.int64) & 0xFFFFFFFF)
    for peer in tl.static_range(RANKS):
        if peer != RANK:
            memory = tl.load(addresses + peer).to(tl.pointer_type(tl.int64))
            tl.store(memory + ((half + RANK) * MOST + program) * ROOM + index, sent, mask=real)
    memory = tl.load(addresses + RANK).to(tl.pointer_type(tl.int64))
    first = tl.zeros([ROWS, WIDTH], tl.float32)
    second = tl.zeros([ROWS, WIDTH], tl.float32)
    for peer in tl.static_range(RANKS):
        word = own
        if peer != RANK:
            left = memory + ((half + peer) * MOST + program) * ROOM
            if ROWS * WIDTH < THREADS:
                # All threads of a program wait together, and only then if each of them reads a word of its own.
                copies = tl.arange(0, THREADS) % (ROWS * WIDTH)
                told = tl.load(left + copies, volatile=True)
                while tl.max(((told >> 32).to(tl.int32) != number).to(tl.int32), 0) > 0:
                    told = tl.load(left + copies, volatile=True)
                told = tl.max(tl.reshape(told, [THREADS // (ROWS * WIDTH), ROWS * WIDTH]), 0)
                received = tl.reshape(told, [ROWS, WIDTH])
            else:
                received = tl.load(left + index, mask=real, other=0, volatile=True)
                while tl.max((real & ((received >> 32).to(tl.int32) != number)).to(tl.int32)) > 0:
                    received = tl.load(left + index, mask=real, other=0, volatile=True)
            word = received.to(tl.int32)
        first, second = _add_word(first, second, word, dtype, True)
    tl.store(counts + program, number)
    return tl.reshape(tl.join(first, second), [ROWS, COLUMNS])


@triton.jit
def _word(first: tl.tensor, second: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Put two numbers, as 16 bits each, into a word of 32."""
    low = first.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | (second.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _add_word(
    first: tl.tensor, second: tl.tensor, word: tl.tensor, dtype: tl.constexpr, PAIRS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Add the number of 32 bits, or the two of 16, that a word holds."""
    if PAIRS:
        first += word.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        second += (word >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    else:
        first += word.to(tl.float32, bitcast=True)
    return first, second
