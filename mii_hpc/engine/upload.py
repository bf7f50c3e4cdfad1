"""How numbers that the host has made, or has in a file, come to the device."""

from __future__ import annotations

import numpy as np
import torch

PART_BYTES = 2**25
"""So much of a tensor is copied at once; as much memory is pinned for each thread, twice or so."""


def staged(numbers: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return numbers as a tensor on the host, in memory that a GPU reads by itself if that is the device."""
    host = torch.from_numpy(numbers)
    return host.pin_memory() if device.type == "cuda" else host


def upload_pages(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor, in pages of a file, on a device: on the host as it is. A GPU may still copy on return."""
    if device.type == "cpu":
        return host
    there = torch.empty_like(host, device=device)
    copy_in_parts(host, there)
    return there


def copy_in_parts(host: torch.Tensor, target: torch.Tensor) -> None:
    """Copy a contiguous tensor from pages of a file to one of its kind on a GPU, which may still copy on return.

    Each part goes through memory that the GPU reads by itself: to wait for the pages, and to copy them on the host, is
    for the calling thread alone, so that several threads do it at once.
    """
    parts = (torch.split(tensor.view(-1).view(torch.uint8), PART_BYTES) for tensor in (host, target))
    for source, there in zip(*parts, strict=True):
        there.copy_(source.pin_memory(), non_blocking=True)


def upload(numbers: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return numbers on a device; a GPU copies them behind what its stream has to do, and nobody waits for it."""
    return staged(numbers, device).to(device, non_blocking=True)
