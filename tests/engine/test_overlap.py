"""Kernels that begin while the one before still runs."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from tests.engine.interpreter import CUDA  # noqa: E402

pytestmark = pytest.mark.engine
CALLS = ["tl.extra.cuda.gdc_launch_dependents()", "tl.extra.cuda.gdc_wait()"]


def test_a_compiled_kernel_waits_once_and_before_all_else(monkeypatch):
    from torch._inductor.codegen.triton import TritonKernel
    from torch._inductor.utils import IndentedBuffer

    from mii_hpc.engine import overlap

    config = torch._inductor.config.triton
    monkeypatch.setattr(overlap, "overlaps", lambda device: True)
    monkeypatch.setattr(TritonKernel, "_enable_pdl_codegen", lambda self: config.enable_pdl)
    plain = {hook: getattr(TritonKernel, hook) for hook in overlap.HOOKS}
    kernel = object.__new__(TritonKernel)
    kernel.inside_reduction = False
    code = IndentedBuffer()
    code.writeline("index = 0")
    with overlap.compiled_kernels_follow(torch.device("cuda")):
        for number in range(2):
            kernel._handle_pdl_before_access(code, f"buffer{number}")
            code.writeline(f"read{number} = tl.load(buffer{number})")
            kernel._handle_pdl_after_load(code, None)
        kernel._handle_pdl_before_access(code, "written", consider_reads=True)
        code.writeline("tl.store(written, read0 + read1)")
        kernel._filter_pdl(code)
    assert code._lines == [
        "index = 0",
        *CALLS,
        "read0 = tl.load(buffer0)",
        "read1 = tl.load(buffer1)",
        "tl.store(written, read0 + read1)",
    ]
    assert not config.enable_pdl
    assert plain == {hook: getattr(TritonKernel, hook) for hook in overlap.HOOKS}


@pytest.mark.skipif(not CUDA, reason="kernels for CUDA")
def test_compiled_kernels_on_a_gpu_wait_for_all_that_they_read():
    from torch._inductor.utils import run_and_get_code

    from mii_hpc.engine.overlap import compiled_kernels_follow, overlaps

    device = torch.device("cuda", torch.cuda.current_device())

    def compute(rows, scale):
        normed = rows * torch.rsqrt(rows.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(rows.dtype)
        return torch.nn.functional.silu(normed @ scale) + rows, rows.cumsum(0)

    rows = torch.randn(40, 4096, device=device, dtype=torch.bfloat16)
    scale = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16) / 64
    with compiled_kernels_follow(device):
        results, sources = run_and_get_code(torch.compile(compute), rows, scale)
    for result, expected in zip(results, compute(rows, scale), strict=True):
        torch.testing.assert_close(result, expected, atol=0.3, rtol=0.05)
    functions = [part.partition("'''")[0] for source in sources for part in source.split("@triton.jit")[1:]]
    kernels = [function for function in functions if "tl.store(" in function]
    assert kernels
    for kernel in kernels if overlaps(device) else ():
        launch, wait = (kernel.index(call) for call in CALLS)
        assert launch < wait < min(kernel.index(call) for call in ("tl.load(", "tl.store(") if call in kernel)
