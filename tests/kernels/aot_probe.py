"""Kernels that bench/aot.py must object to, and one that it must not."""

import triton
import triton.language as tl

from wise_kernels.gpu.launch import AotCase


@triton.jit
def probe_fwd_kernel(p_x, p_out, DOT: tl.constexpr, BLOCK: tl.constexpr):
    o_row, o_all = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    b_x = tl.load(p_x + o_row * BLOCK + o_all)
    if DOT:
        b_x = tl.dot(b_x, tl.trans(b_x)).to(tl.float16)
    tl.store(p_out + o_row * BLOCK + o_all, b_x / tl.sum(b_x, 1, keep_dims=True))


def aot_cases():
    def case(name, dot, block, warps, expect, targets):
        signature = {"p_x": "*fp16", "p_out": "*fp16", "DOT": "constexpr", "BLOCK": "constexpr"}
        constexprs = {"DOT": dot, "BLOCK": block}
        return AotCase(name, probe_fwd_kernel, signature, constexprs, warps, 1, expect, ("p_x", "p_out"), targets)

    return [
        case("good", True, 64, 4, "wgmma", ("sm_80", "sm_90", "gfx942")),
        case("spills", False, 128, 1, None, ("sm_80",)),
        case("no matrix instruction", False, 16, 1, "mma", ("sm_90",)),
        case("no wgmma", True, 32, 1, "wgmma", ("sm_90",)),
    ]
