"""The context of a rank's GPU, made while Python still imports torch."""

from __future__ import annotations

import ctypes


def wake_gpu(local_rank: int) -> None:
    """Have NVIDIA's driver make the context in which torch will compute on this rank's GPU; nothing without such.

    That takes half a second to a second, in which the calling thread does not hold the interpreter. If it fails, torch
    says why as soon as it tries the same.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    count, device, context = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return
    # As choose_device() chooses it.
    if not driver.cuDeviceGet(ctypes.byref(device), local_rank % count.value):
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
