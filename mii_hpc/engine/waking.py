"""The context of a rank's GPU, made while Python still imports torch."""

from __future__ import annotations

import ctypes


def wake_gpu(local_rank: int) -> None:
    """Have NVIDIA's driver make the context in which torch will compute on this rank's GPU; nothing without such.

    That takes half a second to a second, in which the calling thread does not hold the interpreter. If it fails, torch
    says why as soon as it tries the same.
    """
    driver = _driver()
    if driver is None or driver.cuInit(0):
        return
    device, context = _gpu(driver, local_rank), ctypes.c_void_p()
    if device is not None:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


def leave_gpu(local_rank: int) -> None:
    """Give the context back that wake_gpu() has made, if any, where torch cannot compute in it."""
    driver = _driver()
    device = None if driver is None else _gpu(driver, local_rank)
    flags, active = ctypes.c_uint(), ctypes.c_int()
    if driver is None or device is None:
        return
    if not driver.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active)) and active.value:
        driver.cuDevicePrimaryCtxRelease_v2(device)


def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _gpu(driver: ctypes.CDLL, local_rank: int) -> ctypes.c_int | None:
    """Return the GPU that choose_device() chooses; None if there is none, or the driver has not been initialised."""
    count, device = ctypes.c_int(), ctypes.c_int()
    if driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return None
    return None if driver.cuDeviceGet(ctypes.byref(device), local_rank % count.value) else device
