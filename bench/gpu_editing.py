"""masked_update and ties_merge beside the dense PyTorch chains that they replace, for `bench.gpu`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import wise_kernels as kernels
from bench.gpu_banks import RHO, Place, make_bank
from bench.gpu_cases import BF16, FP32, LLAMA, Built, Case
from bench.gpu_timing import Arm

LR, BETAS, EPS, CLAMP = 1e-3, (0.9, 0.999), 1e-8, 0.05


def masked_update(
    layout: str, rows: int, optimizer: str, model: str = LLAMA, dtype: torch.dtype = BF16
) -> Callable[[Place], Built]:
    """One step from activations and output gradients of `rows` tokens in `dtype`, memory and states in fp32."""

    def build(place: Place) -> Built:
        outputs, width = place.shape(model)
        a, dy = (place.normal(place.rows(rows), size, dtype=dtype) for size in (width, outputs))
        bank = make_bank(place, layout, model, 1, FP32, dense=False)
        values = torch.zeros_like(bank.values)
        adam = optimizer == "adam"
        states = [torch.zeros_like(values) if adam else None for _ in range(2)]
        keep = {"lr": LR, "optimizer": optimizer, "betas": BETAS, "eps": EPS, "clamp": CLAMP}

        def ours():
            if layout == "neuron":
                kernels.masked_update_(values, a.index_select(1, bank.index), dy, *states, **keep)
            else:
                kernels.masked_update_element_(values, bank.index[0], a, dy, *states, **keep)
            return values

        if layout == "neuron":
            mask = torch.zeros(outputs, width, dtype=torch.bool, device=a.device)
            mask[:, bank.index] = True
        else:
            mask = kernels.unpack_bits(bank.index[0], width)
        dense = torch.zeros(outputs, width, device=a.device)
        first, second = (torch.zeros_like(dense) for _ in range(2)) if adam else (None, None)

        def plain():
            grad = (dy.t() @ a).float() * mask
            if adam:
                first.lerp_(grad, 1 - BETAS[0])
                second.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
                scale = (1 - BETAS[1]) ** 0.5
                dense.addcdiv_(first, second.sqrt().div_(scale).add_(EPS), value=-LR / (1 - BETAS[0]))
            else:
                dense.add_(grad, alpha=-LR)
            return dense.clamp_(-CLAMP, CLAMP)

        def pair() -> tuple[Tensor, Tensor]:
            expected = plain()
            return (expected[:, bank.index].t() if layout == "neuron" else expected[mask]), ours()

        moved = a.nbytes + dy.nbytes + 2 * values.nbytes * (3 if adam else 1)
        moved += bank.index.nbytes
        return Built({"plain": Arm(plain), "ours": Arm(ours)}, float(moved), 2.0 * len(a) * values.numel(), pair)

    return build


def ties_merge(layout: str, shards: int, density: float = 0.5, model: str = LLAMA) -> Callable[[Place], Built]:
    """Merge of `shards` memories with masks of their own, fp32. `moved` is one read of each and one write."""

    def build(place: Place) -> Built:
        outputs, width = place.shape(model)
        if layout == "neuron":
            size, rows, columns = width, round(RHO * width), outputs
            index = [torch.randperm(size, device=place.device)[:rows].sort().values for _ in range(shards)]
        else:
            size, columns = outputs * width, 1
            index = [(torch.rand(size, device=place.device) < RHO).nonzero()[:, 0] for _ in range(shards)]
        values = [place.normal(len(rows), columns) for rows in index]

        def plain():
            stack = values[0].new_zeros(shards, size, columns)
            for i, (shard, rows) in enumerate(zip(values, index)):
                keep = max(1, int(density * shard.numel() + 0.5))
                tau = shard.abs().flatten().topk(keep).values[-1]
                stack[i].index_copy_(0, rows, torch.where(shard.abs() >= tau, shard, 0))
            agree = (stack.sign() == stack.sum(0).sign()) & (stack != 0)
            return (stack * agree).sum(0) / agree.sum(0).clamp_min(1)

        def ours():
            return kernels.ties_merge(values, index, density)

        def pair() -> tuple[Tensor, Tensor]:
            merged, union = ours()
            return plain()[union], merged

        read = sum(t.nbytes for t in (*values, *index))
        union = len(torch.cat(index).unique())
        arms = {"plain": Arm(plain, graph=False), "ours": Arm(ours, graph=False)}
        return Built(arms, float(read + union * (columns * 4 + 8)), 0.0, pair)

    return build


def editing() -> Iterator[Case]:
    """Cases of the two ops, the ones that targets are about first."""
    for layout in ("neuron", "element"):
        for optimizer in ("adam", "sgd"):
            name = f"{LLAMA}, {layout}, 512 tokens, {optimizer}"
            build = masked_update(layout, 512, optimizer)
            yield Case("masked_update", name, 512, 1, BF16, build, optimizer == "adam", ">= 20x plain")
    for layout in ("neuron", "element"):
        for shards in (2, 4):
            name = f"{LLAMA}, {layout}, {shards} shards"
            yield Case("ties_merge", name, 0, shards, FP32, ties_merge(layout, shards), target=">= 20x plain")
    for rows in (64, 2048):
        name = f"{LLAMA}, neuron, {rows} tokens, adam"
        yield Case("masked_update", name, rows, 1, BF16, masked_update("neuron", rows, "adam"))
