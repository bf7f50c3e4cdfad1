import pytest

torch = pytest.importorskip("torch")

from mii_hpc.engine import upload  # noqa: E402
from mii_hpc.engine.upload import copy_in_parts, upload_pages  # noqa: E402

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(7, 5), (64,), (1,), (), (0, 3)])
def test_a_tensor_is_copied_part_by_part(monkeypatch, dtype, shape):
    parts = []

    def pin_memory(part):
        parts.append(part.nbytes)
        return part.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(upload, "PART_BYTES", 16)
    host = torch.randint(0, 2, shape).to(dtype)
    target = torch.empty_like(host)
    copy_in_parts(host, target)
    assert torch.equal(target.view(-1).view(torch.uint8), host.view(-1).view(torch.uint8))
    assert sum(parts) == host.nbytes and max(parts) <= 16


def test_on_the_host_nothing_is_copied():
    host = torch.ones(3)
    assert upload_pages(host, torch.device("cpu")) is host


@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes a GPU")
@pytest.mark.parametrize("size", [1, 2**24 + 3])
def test_a_gpu_gets_what_the_host_has(size):
    host = torch.randn(size).to(torch.bfloat16)
    assert torch.equal(upload_pages(host, torch.device("cuda", 0)).cpu(), host)
