"""Where kernels in Triton run without a GPU: in its interpreter, in a process that begins with TRITON_INTERPRET=1.

It must be chosen before Triton is first imported, and in the process of all tests another one may have done that.
"""

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
runs_kernels = pytest.mark.skipif(not CUDA and "TRITON_INTERPRET" not in os.environ, reason="see test_interpreter.py")
"""Marks what runs kernels."""
