"""Runs the tests of kernels in Triton's interpreter, where there is no GPU for them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

FILES = (
    "attention/test_triton.py",
    "model/test_peers.py",
    "model/test_products.py",
    "sampling/test_triton.py",
    "test_compiled.py",
)
pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests themselves run on the GPU")
def test_kernels_in_the_interpreter():
    files = [str(Path(__file__).parent / name) for name in FILES]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=840)
    assert ended.returncode == 0, ended.stdout
