"""What every launcher shares: the device guard, whether triton's interpreter is on, and the description of a shipped
configuration, from which bench/aot.py compiles it ahead of time.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

# "sm_*" are NVIDIA's, "gfx942" is AMD's MI300.
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# Where `dependent` launches as such.
PDL_TARGETS = ("sm_90", "sm_100")
# Arguments that change from call to call: specialised on, they would compile again for 1 and for multiples of 16.
SIZES = ("rows", "tokens", "memories", "batch", "s_tb")


def guard(tensor: Tensor) -> AbstractContextManager:
    """Make the device of `tensor` the current one, which triton launches on; nothing for a CPU tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def interpreted() -> bool:
    """Whether kernels run in triton's interpreter (TRITON_INTERPRET=1 before triton's first import).

    Its arithmetic on bf16 blocks is wrong, so kernels convert operands to fp32 before a dot where this holds.
    """
    return triton.knobs.runtime.interpret


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """First in a kernel launched with `dependent`: until the kernels before it have ended and what they wrote shows."""
    if PDL:
        tl.extra.cuda.gdc_wait()


def dependent(tensor: Tensor) -> dict[str, bool]:
    """Options of a launch that may begin while the kernel before it ends (programmatic dependent launch, from Hopper
    on): behind a projection, 1 us less. The kernel calls `wait_for_inputs(PDL)` before it reads anything."""
    return {"PDL": True, "launch_pdl": True} if tensor.is_cuda and _has_pdl(tensor.device) else {"PDL": False}


@cache
def _has_pdl(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


@dataclass(frozen=True)
class AotCase:
    """One shipped configuration of a kernel; each gpu module lists its own in `aot_cases()`.

    Attributes:
        name: "op/regime/dtype"-like, unique in its module.
        kernel: the function under `@triton.jit`.
        signature: argument name -> triton type, such as "*bf16", "i32", "i64", "fp32" or "constexpr".
        constexprs: argument name -> value, for the arguments that are "constexpr".
        num_warps, num_stages, maxnreg: as launched.
        expect: "wgmma" promises wgmma on sm_90 and a matrix instruction elsewhere, "mma" a matrix instruction
            everywhere, None nothing.
        divisible: names of the arguments that are multiples of 16 at run time, as contiguous pointers and usual
            strides are: without them the code is not what the JIT makes.
        targets: the architectures that this configuration is launched on.
    """

    name: str
    kernel: triton.JITFunction
    signature: dict[str, str]
    constexprs: dict[str, object] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    expect: str | None = None
    divisible: tuple[str, ...] = ()
    targets: tuple[str, ...] = TARGETS
    maxnreg: int | None = None
