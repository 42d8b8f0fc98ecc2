"""What both layouts of masked_update share: the product over tokens, the optimiser's step on a block of entries, and
the host side of the two. The kernels are in masked_update.py (neuron) and masked_update_element.py (element).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import TARGETS, AotCase, interpreted

# Up to so many tokens fp32 is multiplied as it is.
EXACT_TOKENS = 64


@triton.jit
def load_entries(p_values, p_first, p_second, o_entry, m_entry, ADAM: tl.constexpr, MOMENTUM: tl.constexpr):
    """The entries at `o_entry` and, as far as the optimiser has them, their moments, for `apply_step`."""
    b_value = tl.load(p_values + o_entry, mask=m_entry, other=0.0).to(tl.float32)
    b_first, b_second = b_value, b_value
    if ADAM or MOMENTUM:
        b_first = tl.load(p_first + o_entry, mask=m_entry, other=0.0)
    if ADAM:
        b_second = tl.load(p_second + o_entry, mask=m_entry, other=0.0)
    return b_value, b_first, b_second


@triton.jit
def apply_step(
    b_grad, entries, p_values, p_first, p_second, p_copy, o_entry, m_entry, lr, decay, momentum, weight1, beta2, eps,
    scale, step_size, clamp,
    ADAM: tl.constexpr, MOMENTUM: tl.constexpr, CLAMP: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    """The step of the entries at `o_entry`, in torch.optim's order of operations, in fp32."""
    b_value, b_first, b_second = entries
    b_value *= decay
    if ADAM:
        # torch.lerp changes form at 1/2, so that weight 1 gives the end exactly.
        near = b_first + weight1 * (b_grad - b_first)
        b_first = tl.where(weight1 < 0.5, near, b_grad - (b_grad - b_first) * (1.0 - weight1))
        b_second = b_second * beta2 + (1.0 - beta2) * b_grad * b_grad
        # Root and quotients to the last bit or two: exactly rounded ones take longer than a small product. A second
        # moment below fp32's normal numbers (1.2e-38) has the root 0, which any usual eps is far above.
        b_root = tl.sqrt(b_second) / scale + eps
        b_value = b_value - step_size * (b_first / b_root)
        tl.store(p_first + o_entry, b_first, mask=m_entry)
        tl.store(p_second + o_entry, b_second, mask=m_entry)
    else:
        if MOMENTUM:
            b_grad = b_first * momentum + b_grad
            tl.store(p_first + o_entry, b_grad, mask=m_entry)
        b_value = b_value - lr * b_grad
    if CLAMP:
        b_value = tl.clamp(b_value, -clamp, clamp, propagate_nan=tl.PropagateNan.ALL)
    tl.store(p_values + o_entry, b_value.to(p_values.dtype.element_ty), mask=m_entry)
    if COPY:
        tl.store(p_copy + o_entry, b_value.to(p_copy.dtype.element_ty), mask=m_entry)


@triton.jit
def token_product(
    p_left, p_right, o_left, o_right, m_left, m_right, N, stride_ln, stride_rn,
    BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """left^T right [BLOCK_L, BLOCK_R] over all N tokens, fp32; o_left and o_right are offsets inside a token."""
    o_n = tl.arange(0, BLOCK_N)
    p_l = p_left + o_left[:, None] + (o_n * stride_ln)[None, :]
    p_r = p_right + o_right[None, :] + (o_n * stride_rn)[:, None]
    b_acc = tl.zeros((BLOCK_L, BLOCK_R), dtype=tl.float32)
    for n in range(0, N, BLOCK_N):
        m_n = o_n < N - n
        b_l = tl.load(p_l, mask=m_left[:, None] & m_n[None, :], other=0.0)
        b_r = tl.load(p_r, mask=m_right[None, :] & m_n[:, None], other=0.0)
        if UPCAST:
            b_l, b_r = b_l.to(tl.float32), b_r.to(tl.float32)
        b_acc = tl.dot(b_l, b_r, b_acc, input_precision=PRECISION)
        p_l += BLOCK_N * stride_ln
        p_r += BLOCK_N * stride_rn
    return b_acc


@triton.jit
def split_columns(b_tile, PARTS: tl.constexpr):
    """The tile cut into blocks of columns, without a detour through shared memory where a thread owns several."""
    if PARTS == 1:
        return (b_tile,)
    else:
        rows: tl.constexpr = b_tile.shape[0]
        columns: tl.constexpr = b_tile.shape[1]
        left, right = b_tile.reshape(rows, 2, columns // 2).permute(0, 2, 1).split()
        return split_columns(left, PARTS // 2) + split_columns(right, PARTS // 2)


def product_operands(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, dict[str, object]]:
    """The operands in one dtype that the kernels multiply, and the constants of `token_product`.

    bf16 and fp16 as they are: their products are exact in fp32. fp32 as tf32x3, which keeps 21 bits of each factor and
    fp32's exponents, so Adam's small second moments are safe; on Hopper it is about twice as fast as the fp32 units.
    Few tokens are bound by memory, and without tf32 (AMD, older than Ampere) there is no choice: ieee.
    """
    if left.dtype != right.dtype or left.dtype == torch.float64:
        left, right = left.float(), right.float()
    tf32 = left.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(left.device)[0] >= 8
    exact = not tf32 or left.shape[0] <= EXACT_TOKENS
    return left, right, {"UPCAST": interpreted(), "PRECISION": "ieee" if exact else "tf32x3"}


def aligned_columns(t: Tensor) -> Tensor:
    """t [N, K], or a copy with zero columns up to a multiple of 16 where K is none: then neither the rows' addresses
    nor the mask of the last columns stand in the way of loads of 16 bytes."""
    if t.shape[1] % 16 == 0:
        return t
    wide = t.new_empty(t.shape[0], triton.cdiv(t.shape[1], 16) * 16)
    wide[:, : t.shape[1]] = t
    wide[:, t.shape[1] :] = 0
    return wide


def hyper_arguments(
    lr, step, optimizer, momentum, beta1, beta2, eps, weight_decay, clamp
) -> tuple[tuple, dict[str, bool]]:
    adam = optimizer == "adam"
    # Powers of beta in fp64 on the host, as torch.optim does.
    scale, step_size = (1 - beta2**step) ** 0.5, lr / (1 - beta1**step)
    values = (lr, 1 - lr * weight_decay, momentum, 1 - beta1, beta2, eps, scale, step_size, clamp or 0.0)
    return values, {"ADAM": adam, "MOMENTUM": not adam and momentum > 0, "CLAMP": clamp is not None}


class Contiguous:
    """Contiguous stand-ins for tensors that are changed in place: the tensors themselves in the usual case."""

    def __init__(self, *tensors: Tensor | None):
        self.given, self.used = tensors, [t if t is None else t.contiguous() for t in tensors]

    def arguments(self) -> list[Tensor]:
        return [self.used[0] if t is None else t for t in self.used]

    def write_back(self) -> None:
        for given, used in zip(self.given, self.used, strict=True):
            if used is not given:
                given.copy_(used)


POINTERS = {"p_bits": "*i32", "p_starts": "*i32", "p_row_start": "*i64", "p_counts": "*i64", "p_copy": "*bf16"}
HALVES = ("bf16", "fp16")
OPERANDS = ("p_features", "p_a", "p_dy")
# Inside a token a stride is 1, which the JIT makes a constant; N is not specialised, and V is any number.
UNIT_STRIDES = ("stride_fk", "stride_do", "stride_af", "stride_bw", "stride_w")
OPTIMIZERS = {
    name: {"ADAM": name == "adam", "MOMENTUM": name == "momentum", "CLAMP": True, "COPY": True}
    for name in ("adam", "momentum", "sgd")
}


def case(name: str, kernel, constexprs: dict, inputs: str = "fp32", ragged: tuple[str, ...] = (), **options) -> AotCase:
    """The configuration with every stride and size but N, V and those named `ragged` divisible by 16."""
    signature, constexprs = {}, dict(constexprs)
    for argument in kernel.arg_names:
        if argument in UNIT_STRIDES:
            constexprs[argument] = 1
        if argument in constexprs:
            signature[argument] = "constexpr"
        elif argument.startswith("p_"):
            signature[argument] = f"*{inputs}" if argument in OPERANDS else POINTERS.get(argument, "*fp32")
        else:
            signature[argument] = "i32" if argument.isupper() or argument.startswith("stride") else "fp32"
    ragged = ("N", "V", *ragged)
    divisible = tuple(a for a, t in signature.items() if t[0] == "*" or t == "i32" and a not in ragged)
    return AotCase(f"masked_update/{name}", kernel, signature, constexprs, divisible=divisible, **options)


def product_cases(kind: str, kernel, configs: dict, axes: tuple[str, str], flags: dict) -> list[AotCase]:
    """The configurations of a kernel with a `token_product`, in every dtype and precision they are launched in."""
    cases = []
    nvidia = tuple(target for target in TARGETS if target.startswith("sm_"))
    others = tuple(target for target in TARGETS if target not in nvidia)
    for precision, targets in (("tf32x3", nvidia), ("ieee", TARGETS)):
        for regime, (rows, columns, block_n, parts, warps, stages) in configs.items():
            for inputs in {"16": HALVES, "32": ("fp32",)}.get(regime[-2:], (*HALVES, "fp32")):
                # Momentum and SGD are Adam's step with less in registers: one tile proves that they compile.
                if not flags.get("ADAM", True) and (regime, inputs) != ("few16", "bf16"):
                    continue
                blocks = {axes[0]: rows, axes[1]: columns, "BLOCK_N": block_n, "PARTS": parts}
                constexprs = blocks | flags | {"UPCAST": False, "PRECISION": precision}
                options = {"num_warps": warps, "num_stages": stages, "targets": targets}
                options["expect"] = "wgmma" if regime.startswith("many") else "mma"
                if precision == "ieee":
                    # 16 bits are multiplied alike in either precision; the matrix units of AMD alone take fp32.
                    options["targets"] = TARGETS if inputs == "fp32" else others
                    options["expect"] = None if inputs == "fp32" else options["expect"]
                name = f"{kind}/{regime}/{inputs}/{precision}"
                cases.append(case(name, kernel, constexprs, inputs, **options))
                if flags.get("ADAM") and regime.startswith("many") and inputs != "fp16":
                    # rho 0.2 of 11008 columns is 2202: no multiple of 16.
                    odd = dict(options, ragged=("K",))
                    cases.append(case(f"{name}/ragged", kernel, constexprs, inputs, **odd))
    return cases
