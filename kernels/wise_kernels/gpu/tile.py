"""Block sizes of the matrix products, one frozen record a configuration, and which table of them fits a device."""

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Tile:
    """Rows of activations, outputs and depth (the summed dimension) of a program's step; its warps and stages, and what
    its threads' registers are held to where that lets another program share the SM."""

    rows: int
    outputs: int
    depth: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def blocks(self) -> dict[str, int]:
        """The block sizes under the names that the kernels of this package give them."""
        return {"BN": self.rows, "BO": self.outputs, "BK": self.depth}

    @property
    def options(self) -> dict[str, int]:
        """What a launch, or an `AotCase`, takes besides."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options if self.registers is None else options | {"maxnreg": self.registers}


def family(tensor: torch.Tensor) -> str:
    """Which table of tiles fits the dtype and device of `tensor`, a key of TARGETS_OF."""
    if tensor.dtype == torch.float32:
        return "fp32"
    if torch.version.hip is not None:
        return "amd"
    # Consumer cards and Ampere: no matrix instruction that reads shared memory, and less of that.
    return "wgmma" if not tensor.is_cuda or _capability(tensor.device) in (9, 10) else "mma"


def is_sm100(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is on a device of NVIDIA's Blackwell, whose compiler gives out registers in another way."""
    return tensor.is_cuda and torch.version.hip is None and _capability(tensor.device) == 10


@cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


# The architectures that a table's configurations are compiled for ahead of time.
TARGETS_OF = {
    "wgmma": ("sm_90", "sm_100"),
    "mma": ("sm_80",),
    "amd": ("gfx942",),
    "fp32": ("sm_80", "sm_90", "sm_100", "gfx942"),
}
# What to find in their code.
EXPECT_OF = {"wgmma": "wgmma", "mma": "mma", "amd": "mma", "fp32": None}


def kinds_of(table: str) -> tuple[str, ...]:
    """The float types that a table is used for, as in a triton signature."""
    return ("fp32",) if table == "fp32" else ("bf16", "fp16")
