"""How numbers that the host has made come to the device."""

from __future__ import annotations

import numpy as np
import torch


def staged(numbers: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return numbers as a tensor on the host, in memory that a GPU reads by itself if that is the device."""
    host = torch.from_numpy(numbers)
    return host.pin_memory() if device.type == "cuda" else host


def upload(numbers: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return numbers on a device; a GPU copies them behind what its stream has to do, and nobody waits for it."""
    return staged(numbers, device).to(device, non_blocking=True)
