"""One optimiser step on a compact side memory, in place: the sampled product g = M * (dY^T a), SGD with momentum or
Adam, decoupled weight decay and an elementwise clamp, with no dense gradient. Neuron layout: values [K, O] and
g = features^T dY with features [N, K] = a_S, or a_S P for the protected update; element layout: values [V], bits
[O, ceil(F/32)], g gathered at the set bits from blocks of rows of dY^T a. Decay cannot leave the mask, because
nothing outside it exists.
"""

import numpy as np
import torch
from torch import Tensor

from .bits import check_count, positions, scatter_packed, unpack_bits, words
from .checks import direct

OPTIMIZERS = ("sgd", "adam")
MUTATED = ("values", "exp_avg", "exp_avg_sq", "copy")
# Entries of dY^T a that are dense at a time: 4 MB, and products large enough to run at full speed.
BLOCK_ENTRIES = 1 << 20


def _adam(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, lr, step, beta1, beta2, eps, decay
) -> None:
    tensors = (master, grad, exp_avg, exp_avg_sq)
    if master.device.type == "cpu" and all(t.is_contiguous() for t in tensors):
        # The kernel of AdamW(fused=True): one pass over memory, not ten, and a last bit from what is below.
        betas = {"beta1": beta1, "beta2": beta2}
        state = ([master], [grad], [exp_avg], [exp_avg_sq], [], [torch.tensor(float(step))])
        flags = {"amsgrad": False, "maximize": False}
        return torch._fused_adamw_(*state, lr=lr, **betas, weight_decay=decay, eps=eps, **flags)
    master.mul_(1 - lr * decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    # torch.optim's order of operations, so that the result is its result to the last bits.
    scale = (1 - beta2**step) ** 0.5
    master.addcdiv_(exp_avg, exp_avg_sq.sqrt().div_(scale).add_(eps), value=-lr / (1 - beta1**step))


def _apply_step(
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    copy: Tensor | None,
    lr: float,
    step: int,
    optimizer: str,
    momentum: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clamp: float | None,
) -> None:
    # .float() of an fp32 tensor is that tensor: fp32 memories are stepped in place, others through one fp32 copy.
    master = values.float()
    if optimizer == "adam":
        _adam(master, grad, exp_avg, exp_avg_sq, lr, step, beta1, beta2, eps, weight_decay)
    else:
        if weight_decay:
            master.mul_(1 - lr * weight_decay)
        if momentum:
            grad = exp_avg.mul_(momentum).add_(grad)
        master.add_(grad, alpha=-lr)
    if clamp is not None:
        master.clamp_(-clamp, clamp)
    if master is not values:
        values.copy_(master)
    if copy is not None:
        copy.copy_(master)


def _sampled_product(bits: Tensor, a: Tensor, dy: Tensor, count: int) -> Tensor:
    """(dY^T a) at the set bits, packed [count] fp32; one block of output rows is dense at a time."""
    a, dy, width = a.float(), dy.float(), a.shape[1]
    block = max(1, BLOCK_ENTRIES // max(1, width))
    lows = range(0, bits.shape[0], block)
    if a.device.type == "cpu":
        at = positions(bits, width)
        check_count(len(at), count)
        # One buffer: a fresh one for each block costs a page fault for every 4 KB.
        packed, dense = a.new_empty(count), a.new_empty(min(block, bits.shape[0]), width)
        edges = np.asarray([*(width * low for low in lows), width * bits.shape[0]])
        starts = np.searchsorted(at.numpy(), edges.astype(at.numpy().dtype)).tolist()
        for low, start, end in zip(lows, starts, starts[1:]):
            part = dy[:, low : low + block].t()
            torch.mm(part, a, out=dense[: part.shape[0]])
            inside = at[start:end] - low * width if low else at[start:end]
            torch.index_select(dense.flatten(), 0, inside, out=packed[start:end])
        return packed
    # Slot `count` takes what lies outside the mask: no host sync, so a wrong V is the caller's to avoid.
    packed, start = a.new_zeros(count + 1), torch.zeros((), dtype=torch.int64, device=a.device)
    for low in lows:
        mask = unpack_bits(bits[low : low + block], width)
        start = scatter_packed(packed, dy[:, low : low + block].t() @ a, mask, start)
    return packed[:-1]


def _update_neuron(
    values: Tensor,
    features: Tensor,
    dy: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    copy: Tensor | None,
    lr: float,
    step: int,
    optimizer: str,
    momentum: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clamp: float | None,
) -> None:
    # fp32 product: rounding the gradient to bf16 before Adam's square would lose small second moments.
    grad = features.float().t() @ dy.float()
    hyper = (lr, step, optimizer, momentum, beta1, beta2, eps, weight_decay, clamp)
    _apply_step(values, grad, exp_avg, exp_avg_sq, copy, *hyper)


def _update_element(
    values: Tensor,
    bits: Tensor,
    a: Tensor,
    dy: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    copy: Tensor | None,
    lr: float,
    step: int,
    optimizer: str,
    momentum: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clamp: float | None,
) -> None:
    grad = _sampled_product(bits, a, dy, values.shape[0])
    hyper = (lr, step, optimizer, momentum, beta1, beta2, eps, weight_decay, clamp)
    _apply_step(values, grad, exp_avg, exp_avg_sq, copy, *hyper)


_masked_update_ = torch.library.custom_op("wise::masked_update_", _update_neuron, mutates_args=MUTATED)
_masked_update_element_ = torch.library.custom_op("wise::masked_update_element_", _update_element, mutates_args=MUTATED)


@_masked_update_.register_kernel("cuda")
def _(*arguments) -> None:
    from .gpu.masked_update import masked_update

    masked_update(*arguments)


@_masked_update_element_.register_kernel("cuda")
def _(*arguments) -> None:
    from .gpu.masked_update_element import masked_update_element

    masked_update_element(*arguments)


@_masked_update_.register_fake
@_masked_update_element_.register_fake
def _fake(*args) -> None:
    return None


def _check_step(
    values, exp_avg, exp_avg_sq, copy, lr, step, optimizer, momentum, betas, eps, weight_decay, clamp
) -> None:
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {OPTIMIZERS}, got {optimizer!r}")
    if step < 1 or min(lr, momentum, eps, weight_decay, 0.0 if clamp is None else clamp) < 0:
        raise ValueError("step counts from 1; lr, momentum, eps, weight_decay and clamp must not be negative")
    if len(betas) != 2 or not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
    needs_first = optimizer == "adam" or momentum > 0
    for name, state, needed in (("exp_avg", exp_avg, needs_first), ("exp_avg_sq", exp_avg_sq, optimizer == "adam")):
        if state is None and needed:
            raise ValueError(f"{optimizer} needs {name}: pass zeros, fp32 {tuple(values.shape)}, on the first step")
        # fp16 cannot hold a second moment, and the state is as compact as the memory.
        if state is not None and (state.shape != values.shape or state.dtype != torch.float32):
            raise ValueError(f"{name} must be fp32 {tuple(values.shape)}, got {state.dtype} {tuple(state.shape)}")
    if copy is not None and (copy.shape != values.shape or not copy.dtype.is_floating_point):
        expected = f"floating point {tuple(values.shape)}"
        raise ValueError(f"copy must be {expected}, got {copy.dtype} {tuple(copy.shape)}")


def masked_update_(
    values: Tensor,
    features: Tensor,
    dy: Tensor,
    exp_avg: Tensor | None = None,
    exp_avg_sq: Tensor | None = None,
    *,
    lr: float,
    step: int = 1,
    optimizer: str = "sgd",
    momentum: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clamp: float | None = None,
    copy: Tensor | None = None,
) -> None:
    """One optimiser step on a memory in the neuron layout, in place: grad = features^T dY.

    SGD is torch.optim.SGD's (momentum without dampening), Adam is torch.optim.AdamW's (bias-corrected). Weight decay
    is decoupled in both: values *= 1 - lr * weight_decay, before the step. The clamp comes last. The product and
    the step are made in fp32 whatever the dtypes; on tensor cores an fp32 product is split in three tf32 ones.

    Args:
        values: [K, O] floating point, changed in place.
        features: [N, K] floating point, a_S (or a_S P for the protected update).
        dy: [N, O] floating point, the gradient of the loss to the projection's output.
        exp_avg: [K, O] fp32, zeros at first: the momentum buffer of SGD, the first moment of Adam. Changed in place.
        exp_avg_sq: [K, O] fp32, zeros at first: the second moment of Adam. Changed in place.
        lr, momentum, betas, eps, weight_decay: as in torch.optim. With eps 0, a gradient whose second moment is below
            1.2e-38 divides by zero on a device.
        step: number of this step, from 1.
        optimizer: "sgd" or "adam".
        clamp: bound on |values|, or None.
        copy: [K, O] floating point or None: takes the new values, in its own dtype, in the same pass. The memory that
            serves (bf16, say) while the fp32 `values` are trained. Changed in place.

    Raises ValueError for shapes, dtypes or hyperparameters other than these, or missing optimiser state.
    """
    matrices = values.dim() == features.dim() == dy.dim() == 2
    if not matrices or features.shape != (dy.shape[0], values.shape[0]) or dy.shape[1] != values.shape[1]:
        given = f"{tuple(values.shape)}, {tuple(features.shape)}, {tuple(dy.shape)}"
        raise ValueError(f"need values [K, O], features [N, K] and dy [N, O], got {given}")
    _check_step(values, exp_avg, exp_avg_sq, copy, lr, step, optimizer, momentum, betas, eps, weight_decay, clamp)
    hyper = (float(lr), step, optimizer, float(momentum), *betas, float(eps), float(weight_decay), clamp)
    given = (values, features, dy, exp_avg, exp_avg_sq, copy)
    (_update_neuron if direct(*given) else _masked_update_)(*given, *hyper)


def masked_update_element_(
    values: Tensor,
    bits: Tensor,
    a: Tensor,
    dy: Tensor,
    exp_avg: Tensor | None = None,
    exp_avg_sq: Tensor | None = None,
    *,
    lr: float,
    step: int = 1,
    optimizer: str = "sgd",
    momentum: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clamp: float | None = None,
    copy: Tensor | None = None,
) -> None:
    """One optimiser step on one memory in the element layout, in place: grad = (dY^T a) at the set bits.

    The optimisers are those of `masked_update_`. Only a block of output rows of dY^T a exists at a time.

    Args:
        values: [V] floating point, one to each set bit in row-major order, changed in place.
        bits: [O, ceil(F/32)] int32, see `bits.py`.
        a: [N, F] floating point, the input of the projection.
        dy: [N, O] floating point, the gradient of the loss to the projection's output.
        exp_avg, exp_avg_sq: [V] fp32 optimiser state, as for `masked_update_`. Changed in place.
        lr, step, optimizer, momentum, betas, eps, weight_decay, clamp: as for `masked_update_`.
        copy: [V] floating point or None, as for `masked_update_`. Changed in place.

    Raises ValueError for shapes, dtypes or hyperparameters other than these, missing optimiser state, and on CPU
    where `bits` and `values` disagree on V.
    """
    if values.dim() != 1 or a.dim() != 2 or dy.dim() != 2 or a.shape[0] != dy.shape[0]:
        given = f"{tuple(values.shape)}, {tuple(a.shape)}, {tuple(dy.shape)}"
        raise ValueError(f"need values [V], a [N, F] and dy [N, O], got {given}")
    shape = (dy.shape[1], words(a.shape[1]))
    if bits.dtype != torch.int32 or tuple(bits.shape) != shape:
        raise ValueError(f"bits must be int32 {shape}, got {bits.dtype} {tuple(bits.shape)}")
    _check_step(values, exp_avg, exp_avg_sq, copy, lr, step, optimizer, momentum, betas, eps, weight_decay, clamp)
    hyper = (float(lr), step, optimizer, float(momentum), *betas, float(eps), float(weight_decay), clamp)
    given = (values, bits, a, dy, exp_avg, exp_avg_sq, copy)
    (_update_element if direct(*given) else _masked_update_element_)(*given, *hyper)
