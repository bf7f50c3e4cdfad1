"""Plain weights out of quantised ones: a formula for each way in which checkpoints hold them.

Each takes the tensors that make up a weight, by what each is, and returns the weight as the model has it, in float32
where it says no other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping

import torch

from mii_hpc.errors import ConfigError
from mii_hpc.printable import one_line
from mii_hpc.quantisation import Packed

Tensors = Mapping[str, torch.Tensor]
_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
"""At which place of a word each of eight outputs is."""
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What three bits of a number are; the fourth is the sign."""


def dequantised(packed: Packed, tensors: Tensors) -> torch.Tensor:
    """Return a plain weight. Raises ConfigError for tensors that do not make one up, as far as headers do not tell."""
    return _FORMS[packed.form](tensors, packed)


def scaled(tensors: Tensors, packed: Packed) -> torch.Tensor:
    """Return a weight [outputs, inputs] times its scales.

    There is one for all of it, one for each output, or one for each block of rows and columns; the last blocks may be
    smaller. Without a size the blocks are of one. LLM.int8 (bitsandbytes) stores the largest weight of each output.
    """
    weight, scales = tensors["weight"], tensors["scales"].float()
    if packed.quantisation.method == "bitsandbytes":
        scales = scales / 127
    if scales.dim() < 2:
        return weight.float() * scales.view(-1, 1)
    block = packed.quantisation.block
    rows, columns = block or (weight.shape[0] // scales.shape[0], weight.shape[1] // scales.shape[1])
    if scales.shape[0] > 1:
        scales = scales.repeat_interleave(1 if len(scales) == len(weight) else rows, 0)[: len(weight)]
    if scales.shape[1] > 1:
        scales = scales.repeat_interleave(columns, 1)[:, : weight.shape[1]]
    return weight.float() * scales


def gptq(tensors: Tensors, packed: Packed) -> torch.Tensor:
    """Return a weight of GPTQ: as AutoGPTQ and GPTQModel pack it, in either format, `desc_act` or not.

    g_idx has the group of each input. The first format stores zero points less one, and cannot store 0: where one seems
    to be, those who read the format differ, so it is refused.
    """
    bits, (outputs, inputs) = _known(packed)
    numbers = unpacked(tensors["qweight"].T, bits, inputs)
    zeros = unpacked(tensors["qzeros"], bits, outputs).T
    if packed.quantisation.zero_offset and (zeros == 2**bits - 1).any():
        raise ConfigError(
            f"{packed.names['qzeros']}: it has zero points that checkpoint_format='gptq' cannot hold, and 'gptq_v2' can"
        )
    zeros = zeros + packed.quantisation.zero_offset
    groups = tensors.get("g_idx")
    if groups is not None and not 0 <= int(groups.min()) <= int(groups.max()) < zeros.shape[1]:
        raise ConfigError(f"{packed.names['g_idx']}: it names groups that are not there")
    return _grouped(numbers, zeros, tensors["scales"].T, groups)


def awq(tensors: Tensors, packed: Packed) -> torch.Tensor:
    """Return a weight of AWQ in the layout `gemm`, as AutoAWQ packs it: eight outputs a word, the even ones first."""
    places = torch.arange(tensors["scales"].shape[1]).view(-1, 8)[:, _AWQ_ORDER].flatten()
    numbers, zeros = (_numbers_at(places, tensors[part], 4).T for part in ("qweight", "qzeros"))
    return _grouped(numbers, zeros, tensors["scales"].T, None)


def integers(tensors: Tensors, packed: Packed) -> torch.Tensor:
    """Return a weight of compressed-tensors' format `pack-quantized`: whole numbers, half their range added to each."""
    words, scales = tensors["weight_packed"], tensors["weight_scale"]
    outputs, inputs = tensors["weight_shape"].tolist()
    bits = next((bits for bits in (4, 8) if words.shape == (outputs, -(-inputs * bits // 32))), None)
    groups = scales.shape[1]
    if bits is None or scales.shape[0] != outputs or inputs % groups:
        raise ConfigError(f"{packed.names['weight_shape']}: [{outputs}, {inputs}] is not the shape of the weight")
    zeros = torch.full_like(scales, 2 ** (bits - 1), dtype=torch.uint8)
    if (stored := tensors.get("weight_zero_point")) is not None:
        if stored.shape != (-(-outputs * bits // 32), groups):
            raise ConfigError(
                f"{packed.names['weight_zero_point']}: {list(stored.shape)} is not the shape of the zero points"
            )
        zeros = unpacked(stored.T, bits, outputs).T
    return _grouped(unpacked(words, bits, inputs), zeros, scales, None)


def four_bits(tensors: Tensors, packed: Packed) -> torch.Tensor:
    """Return a weight of bitsandbytes' nf4 or fp4 (QLoRA, https://arxiv.org/abs/2305.14314): high half-bytes first.

    Each is one of sixteen values times the largest of its block. These may themselves be quantised ("double
    quantisation"): one of 256 values times the largest of theirs, plus an offset. The state says the rest, as JSON.
    """
    try:
        state = json.loads(bytes(tensors["state"].tolist()))
        absmax = tensors["absmax"]
        if "nested_absmax" in tensors:
            numbers, largest = tensors["nested_quant_map"][absmax.int()], tensors["nested_absmax"]
            absmax = _times_largest(numbers, largest, int(state["nested_blocksize"])) + float(state["nested_offset"])
        halves = tensors["weight"].contiguous().view(torch.uint8).flatten()
        numbers = torch.stack([halves >> 4, halves & 15], -1).flatten()[: math.prod(state["shape"])]
        numbers = tensors["quant_map"][numbers.int()]
        return _times_largest(numbers, absmax, int(state["blocksize"])).view(state["shape"])
    except (ValueError, KeyError, TypeError, RuntimeError, RecursionError, OverflowError) as error:
        raise ConfigError(f"{packed.names['state']}: it does not describe the weight: {one_line(error)}") from None


def _times_largest(numbers: torch.Tensor, largest: torch.Tensor, block: int) -> torch.Tensor:
    if block < 1 or largest.shape != (-(-len(numbers) // block),):
        raise ValueError(f"{list(largest.shape)} is not one for each {block} of {len(numbers)}")
    return numbers * largest.repeat_interleave(block)[: len(numbers)]


def mxfp4(tensors: Tensors, packed: Packed) -> torch.Tensor:
    """Return experts' weights [experts, inputs, outputs] in bfloat16, which holds them exactly.

    32 numbers (E2M1, the low half-bytes first) share a power of two (E8M0), as OCP's Microscaling Formats 1.0 have it;
    gpt-oss is published so.
    """
    blocks, scales = tensors["blocks"], tensors["scales"]
    experts, outputs, groups = scales.shape
    values = torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=torch.bfloat16, device=blocks.device)
    weight = values.new_empty(experts, groups * 32, outputs)
    for expert in range(experts):  # one by one, so that what is in between stays small
        halves = torch.stack([blocks[expert] & 15, blocks[expert] >> 4], -1).flatten(2)
        powers = scales[expert].int().unsqueeze(-1) - 127
        weight[expert] = torch.ldexp(values[halves.int()], powers).flatten(1).T
    return weight


def unpacked(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return the first so many numbers of so many bits, up to 8, that 32-bit words hold along the last dimension.

    The lowest bits come first; where 32 is no multiple of `bits`, some numbers lie in two words.
    """
    return _numbers_at(torch.arange(count), words, bits)


def _numbers_at(places: torch.Tensor, words: torch.Tensor, bits: int) -> torch.Tensor:
    begins = places.to(words.device) * bits
    word, shift = begins // 32, (begins % 32).int()
    numbers = torch.bitwise_right_shift(words[..., word], shift)
    if 32 % bits:
        cut = shift > 32 - bits
        low = 32 - shift[cut]
        numbers[..., cut] = numbers[..., cut] & ((1 << low) - 1) | words[..., word[cut] + 1] << low
    numbers &= 2**bits - 1
    return numbers.to(torch.uint8)


def _grouped(
    numbers: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, groups: torch.Tensor | None
) -> torch.Tensor:
    """Return numbers [outputs, inputs] less their group's zero point, times its scale; both are [outputs, groups].

    `groups` has the group of each input; without it they are of one size, and side by side.
    """
    weight = numbers.float()
    if groups is None:
        by_group = weight.contiguous().view(len(weight), scales.shape[1], -1)
        return by_group.sub_(zeros.unsqueeze(-1)).mul_(scales.float().unsqueeze(-1)).flatten(1)
    return weight.sub_(zeros[:, groups]).mul_(scales.float()[:, groups])


def _known(packed: Packed) -> tuple[int, tuple[int, ...]]:
    assert packed.bits is not None and packed.shape is not None
    return packed.bits, packed.shape


_FORMS: dict[str, Callable[[Tensors, Packed], torch.Tensor]] = {
    form.__name__: form for form in (scaled, gptq, awq, integers, four_bits, mxfp4)
}
