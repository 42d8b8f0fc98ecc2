"""The ground the gpu tests stand on: kernels run on this machine, on the interpreter where there is no device."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

import wise_kernels  # noqa: E402
from wise_kernels.gpu.launch import guard, interpreted  # noqa: E402


@triton.jit
def double_fwd_kernel(p_x, p_out, size, BLOCK: tl.constexpr):
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o_x, mask=o_x < size).to(tl.float32)
    tl.store(p_out + o_x, (2 * b_x).to(p_out.dtype.element_ty), mask=o_x < size)


def test_the_interpreter_stands_in_for_a_missing_device():
    assert interpreted() == (not torch.cuda.is_available())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_store_rounds_to_nearest_even(device, dtype):
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, 1.69e38])
    x = torch.cat([special, torch.randn(4089, generator=torch.Generator().manual_seed(0))]).to(device)
    out = torch.full_like(x, torch.nan, dtype=dtype)
    with guard(x):
        double_fwd_kernel[(4,)](x, out, x.numel(), BLOCK=1024)
    torch.testing.assert_close(out, (2 * x).to(dtype), rtol=0, atol=0, equal_nan=True)


def test_importing_the_package_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import wise_kernels"
    path = str(Path(wise_kernels.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, check=True)
