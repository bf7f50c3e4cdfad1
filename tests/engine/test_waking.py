import ctypes

import pytest

from mii_hpc.engine import waking
from mii_hpc.engine.waking import leave_gpu, wake_gpu


class Driver:
    """Two GPUs as NVIDIA's driver has them; what it cannot do it answers by a number other than 0."""

    def __init__(self, gpus=2, fails=""):
        self.gpus, self.fails = gpus, fails
        self.contexts = []

    def cuInit(self, flags):
        return int(self.fails == "cuInit")

    def cuDeviceGetCount(self, count):
        count._obj.value = self.gpus
        return 0

    def cuDeviceGet(self, device, number):
        device._obj.value = number
        return int(self.fails == "cuDeviceGet")

    def cuDevicePrimaryCtxGetState(self, device, flags, active):
        active._obj.value = device.value in self.contexts
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, device):
        self.contexts.remove(device.value)
        return 0

    def cuDevicePrimaryCtxRetain(self, context, device):
        self.contexts.append(device.value)
        return 0


@pytest.mark.parametrize(("local_rank", "gpu"), [(0, 0), (1, 1), (2, 0)])
def test_the_context_is_that_of_the_ranks_gpu(monkeypatch, local_rank, gpu):
    driver = Driver()
    monkeypatch.setattr(waking.ctypes, "CDLL", lambda name: driver)
    wake_gpu(local_rank)
    assert driver.contexts == [gpu]


def test_it_is_given_back_once_where_torch_cannot_use_it(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(waking.ctypes, "CDLL", lambda name: driver)
    wake_gpu(0)
    wake_gpu(1)
    for _ in range(2):
        leave_gpu(1)
    assert driver.contexts == [0]


@pytest.mark.parametrize("driver", [Driver(gpus=0), Driver(fails="cuInit"), Driver(fails="cuDeviceGet")])
def test_without_a_gpu_nothing_is_made(monkeypatch, driver):
    monkeypatch.setattr(waking.ctypes, "CDLL", lambda name: driver)
    wake_gpu(0)
    assert driver.contexts == []


def test_without_a_driver_nothing_happens(monkeypatch):
    def none(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", none)
    wake_gpu(0)
