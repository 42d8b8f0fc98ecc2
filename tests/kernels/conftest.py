"""What the kernel tests share: the device they run on, and repairs to triton's interpreter.

tests/conftest.py turns the interpreter on where there is no CUDA device, before anything can import triton.
"""

import importlib.util

import numpy as np
import pytest
import torch


@pytest.fixture
def device():
    """The CUDA device where there is one, else the CPU, where triton kernels run in the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned(monkeypatch):
    """Fill what torch.empty and torch.empty_like return with NaN, or -99, so that a missing write shows."""

    def filling(make):
        def filled(*args, **kwargs):
            made = make(*args, **kwargs)
            return made if made.dtype == torch.bool else made.fill_(float("nan") if made.is_floating_point() else -99)

        return filled

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, filling(getattr(torch, name)))


@pytest.fixture(autouse=True, scope="session")
def interpreter_rounds_bf16():
    """Make the interpreter round fp32 to bf16 to nearest even, as devices do; as it is, it cuts the low bits off."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(data, source, target, mode):
        if source != tl.float32 or target != tl.bfloat16 or mode == interpreter._ir.ROUNDING_MODE.RTZ:
            return convert(data, source, target, mode)
        exact = torch.from_numpy(np.ascontiguousarray(data))
        return exact.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(data.shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", rounding)
        yield
