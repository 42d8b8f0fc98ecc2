"""What `bench.gpu` compares, op by op: plain PyTorch, torch.compile of it, and ours, on the same inputs.

`projection` is the unedited layer's matrix product alone. The plain arms are sync-free chains of PyTorch operations:
in the neuron layout gathered columns and a small product, in the element layout a dense product with each memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import wise_kernels as kernels
from bench.gpu_banks import Bank, Place, make_bank
from bench.gpu_timing import Arm

BF16, FP32 = torch.bfloat16, torch.float32
LLAMA = "Llama-2-7B"
DUAL = {"neuron": kernels.dual_forward, "element": kernels.dual_forward_element}
ADD = {"neuron": kernels.gated_add_, "element": kernels.gated_add_element_}


@dataclass(frozen=True)
class Built:
    """A case on its device: arms in the order of the table, the first is what ratios are over.

    Attributes:
        arms: by name; "plain" is also compiled where the case asks for it.
        moved, flops: bytes and operations that ours cannot do without.
        pair: (expected, got) of one call of plain and of each arm of ours, to be compared before anything is timed.
    """

    arms: dict[str, Arm]
    moved: float
    flops: float
    pair: Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """One line of the table; `build` makes its tensors, on a device or, small, on the CPU."""

    op: str
    name: str
    rows: int
    memories: int
    dtype: torch.dtype
    build: Callable[[Place], Built]
    compiled: bool = False
    target: str = ""


def pair_of(arms: dict[str, Arm]) -> Callable[[], tuple[Tensor, Tensor]]:
    ours = [arm for name, arm in arms.items() if name not in ("projection", "plain")]
    return lambda: tuple(torch.cat([a.call() for a in some]) for some in ([arms["plain"]] * len(ours), ours))


def inputs(place: Place, model: str, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    outputs, width = place.shape(model)
    return place.normal(place.rows(rows), width, dtype=dtype), place.normal(outputs, width, dtype=dtype, scale=0.02)


def work(a: Tensor, weight: Tensor, bank: Bank | None, read: bool = True) -> tuple[float, float]:
    """Bytes and operations of a projection, and of the bank where it is read."""
    rows, outputs, width = a.shape[0], *weight.shape
    moved = weight.nbytes + a.nbytes + rows * outputs * a.element_size()
    flops = 2.0 * rows * outputs * width
    if bank is not None and read:
        moved += bank.nbytes
        stored = bank.values.shape[0] * (outputs if bank.layout == "neuron" else 1)
        flops += 2.0 * rows * stored
    return float(moved), flops


def decode(model: str, layout: str, rows: int, memories: int, dtype: torch.dtype, inside: bool) -> Callable:
    """A decoded token of each of `rows` sequences, the decision taken at prefill: projection and gated add, in two
    launches ("ours", exact) and, in the neuron layout, in one ("fused")."""

    def build(place: Place) -> Built:
        a, weight = inputs(place, model, rows, dtype)
        bank = make_bank(place, layout, model, memories, dtype)
        choice = torch.full((a.shape[0],), memories - 1 if inside else -1, dtype=torch.int64, device=a.device)

        def ours():
            y = F.linear(a, weight)
            ADD[layout](y, a, *bank.arguments, choice, **bank.keep)
            return y

        def plain():
            y = F.linear(a, weight)
            for j in range(memories):
                y = torch.where((choice == j)[:, None], y + bank.respond(a, j), y)
            return y

        arms = {"projection": Arm(lambda: F.linear(a, weight)), "plain": Arm(plain), "ours": Arm(ours)}
        if layout == "neuron":
            given = (a, weight, None, *bank.arguments, choice)
            arms["fused"] = Arm(lambda: kernels.gated_linear(*given, exact_main=False))
        chosen = Bank(layout, *(t[: t.shape[0] // memories] for t in (bank.values, bank.index)), bank.bounds, None)
        return Built(arms, *work(a, weight, chosen, inside), pair_of(arms))

    return build


def prefill(model: str, layout: str, rows: int, memories: int, dtype: torch.dtype, inside: bool) -> Callable:
    """Prompts of `rows` tokens in all: projection, norms, routing and gated add, as the module does it."""

    def build(place: Place) -> Built:
        a, weight = inputs(place, model, rows, dtype)
        bank = make_bank(place, layout, model, memories, dtype)
        batch = 8 if a.shape[0] >= 64 else 1
        mask = torch.ones(batch, a.shape[0] // batch, dtype=torch.bool, device=a.device)
        y_shape = a.shape[0], weight.shape[0]
        # Far apart: rounding must not decide which of several memories answers.
        thresholds = torch.arange(1, memories + 1, device=a.device) * (1e-6 if inside else torch.inf)

        def ours():
            kept = kernels.keeps_response(memories, *y_shape, a.device)
            y, side, norms = DUAL[layout](a, weight, None, *bank.arguments, response=kept, **bank.keep)
            _, choice = kernels.route(norms, mask, thresholds)
            ADD[layout](y, a, *bank.arguments, choice, side if kept else None, **bank.keep)
            return y

        def plain():
            y = F.linear(a, weight)
            side = torch.stack([bank.respond(a, j) for j in range(memories)])
            scores = side.float().norm(dim=-1).unflatten(1, mask.shape).mean(-1).t()
            rank = torch.where(scores > thresholds, scores / thresholds, 0.0)
            best, choice = rank.max(1)
            choice = torch.where(best > 0, choice, -1).repeat_interleave(mask.shape[1], output_size=a.shape[0])
            picked = side.gather(0, choice.clamp_min(0)[None, :, None].expand(1, *y.shape))[0]
            return torch.where((choice >= 0)[:, None], y + picked, y)

        arms = {"projection": Arm(lambda: F.linear(a, weight)), "plain": Arm(plain), "ours": Arm(ours)}
        return Built(arms, *work(a, weight, bank), pair_of(arms))

    return build


def norms(model: str, layout: str, rows: int, memories: int, dtype: torch.dtype) -> Callable:
    """Projection and the exact norms of every memory, no response kept."""

    def build(place: Place) -> Built:
        a, weight = inputs(place, model, rows, dtype)
        bank = make_bank(place, layout, model, memories, dtype)

        def ours():
            return DUAL[layout](a, weight, None, *bank.arguments, response=False, **bank.keep)[2]

        def plain():
            F.linear(a, weight)
            return torch.stack([bank.respond(a, j).float().norm(dim=-1) for j in range(memories)])

        arms = {"projection": Arm(lambda: F.linear(a, weight)), "plain": Arm(plain), "ours": Arm(ours)}
        return Built(arms, *work(a, weight, bank), pair_of(arms))

    return build


def sketched(model: str, layout: str, rows: int, memories: int, dtype: torch.dtype, size: int) -> Callable:
    """Projection and routing over many memories from sketched norms, of which one is clearly in scope."""

    def build(place: Place) -> Built:
        a, weight = inputs(place, model, rows, dtype)
        bank = make_bank(place, layout, model, memories, dtype)
        sketches = kernels.sketch_values(*bank.arguments, a.shape[1], size, torch.Generator().manual_seed(0))
        mask = torch.ones(8, a.shape[0] // 8, dtype=torch.bool, device=a.device)
        thresholds = torch.full((memories,), 1e3, device=a.device)
        thresholds[:1] = 1e-3
        within = kernels.sketch_bound(size, 1e-6)

        def ours():
            F.linear(a, weight)
            return kernels.sketched_route(a, *bank.arguments, sketches, mask, thresholds, within)[1]

        def plain():
            F.linear(a, weight)
            norms = torch.stack([bank.respond(a, j).float().norm(dim=-1) for j in range(memories)])
            scores = norms.unflatten(1, mask.shape).mean(-1).t()
            best, choice = torch.where(scores > thresholds, scores / thresholds, 0.0).max(1)
            return torch.where(best > 0, choice, -1)

        arms = {"projection": Arm(lambda: F.linear(a, weight)), "plain": Arm(plain), "ours": Arm(ours)}
        moved, flops = work(a, weight, None)
        moved += sketches.nbytes
        return Built(arms, moved, flops + 2.0 * a.shape[0] * sketches.numel(), pair_of(arms))

    return build


def leverage(model: str, rows: int, memories: int, dtype: torch.dtype, rank: int = 64) -> Callable:
    """Leverage of every token under every memory, thin factors of `rank` columns in fp32."""

    def build(place: Place) -> Built:
        a, _ = inputs(place, model, rows, dtype)
        bank = make_bank(place, "neuron", model, memories, dtype)
        size = bank.index.shape[0] // memories
        factors = place.normal(bank.index.shape[0], rank, scale=size**-0.5)

        def plain():
            out = []
            for j in range(memories):
                active = a[:, bank.index[j * size : (j + 1) * size]].float()
                out.append((active @ factors[j * size : (j + 1) * size]).square().sum(1))
            return torch.stack(out)

        arms = {"plain": Arm(plain), "ours": Arm(lambda: kernels.leverage(a, bank.index, bank.bounds, factors))}
        moved = a.nbytes + factors.nbytes + bank.index.nbytes + 4 * memories * a.shape[0]
        return Built(arms, float(moved), 2.0 * a.shape[0] * factors.numel(), pair_of(arms))

    return build


def route(rows: int, memories: int, batch: int = 8) -> Callable:
    """Scores, thresholds and choice alone, from norms and leverage."""

    def build(place: Place) -> Built:
        tokens = place.rows(rows) // batch * batch
        given, share = place.normal(memories, tokens).abs(), place.normal(memories, tokens).sigmoid()
        mask = torch.rand(batch, tokens // batch, device=place.device) < 0.8
        mask[:, 0] = True
        thresholds = torch.full((memories,), 0.7, device=place.device)

        def plain():
            count = mask.sum(-1)
            scores = (given.unflatten(1, mask.shape) * mask).sum(-1) / count
            spread = ((share.unflatten(1, mask.shape) * mask).sum(-1) / count).sqrt()
            ratio = (scores / spread).t() / thresholds
            best = ratio.argmax(1)
            return torch.where(ratio.gather(1, best[:, None])[:, 0] > 1, best, -1)

        arms = {"plain": Arm(plain), "ours": Arm(lambda: kernels.route(given, mask, thresholds, share)[1])}
        return Built(arms, float(2 * given.nbytes + mask.nbytes), 0.0, pair_of(arms))

    return build


def _case(op: str, make: Callable, model: str, layout: str, rows: int, memories: int, dtype, *more, **fields) -> Case:
    scope = {(): "", (True,): ", in scope", (False,): ", out of scope"}[more]
    name = f"{model}, {layout}, {rows} rows, J = {memories}, {str(dtype)[6:]}{scope}"
    return Case(op, name, rows, memories, dtype, make(model, layout, rows, memories, dtype, *more), **fields)


def serving() -> Iterator[Case]:
    """Cases of dual_forward, route and gated_add, the ones that targets are about first."""
    for rows in (1, 8):
        for layout in ADD:
            for inside, target in ((False, "<= 1.03x"), (True, "<= 1.30x")):
                yield _case("decode", decode, LLAMA, layout, rows, 1, BF16, inside, compiled=inside, target=target)
    for layout, target in (("neuron", "<= 1.25x"), ("element", "<= 2.1x")):
        for rows in (512, 2048, 64):
            fields = {"compiled": rows == 512, "target": target}
            yield _case("prefill", prefill, LLAMA, layout, rows, 1, BF16, True, **fields)
    for rows, size in ((512, 16), (2048, 16), (2048, 64)):
        build, name = sketched(LLAMA, "neuron", rows, 64, BF16, size), f"{LLAMA}, {rows} rows, J = 64, {size} wide"
        yield Case("sketched", name, rows, 64, BF16, build, target="<= 1.10x")
    for memories in (64, 16, 4, 1):
        yield _case("norms", norms, LLAMA, "neuron", 512, memories, BF16)
        if memories > 1:
            yield _case("decode", decode, LLAMA, "neuron", 8, memories, BF16, False, target="<= 1.03x")
    for memories, rows in ((1, 512), (16, 512), (64, 512), (16, 2048)):
        yield Case("route", f"{rows} rows, J = {memories}", rows, memories, FP32, route(rows, memories), memories == 16)
    for memories in (4, 64):
        name = f"{LLAMA}, 512 rows, J = {memories}, rank 64"
        yield Case("leverage", name, 512, memories, BF16, leverage(LLAMA, 512, memories, BF16), memories == 4)
    for model in ("Gemma-3-270M", "Llama-3-8B", "GPT-J"):
        for layout, target in (("neuron", "<= 1.25x"), ("element", "<= 2.1x")):
            yield _case("decode", decode, model, layout, 1, 1, BF16, True, target="<= 1.30x")
            yield _case("prefill", prefill, model, layout, 512, 1, BF16, True, target=target)
    for layout in ADD:
        yield _case("prefill", prefill, LLAMA, layout, 512, 4, BF16, True)
        yield _case("norms", norms, LLAMA, layout, 64, 4, BF16)
        for rows in (8, 512):
            yield _case("prefill", prefill, LLAMA, layout, rows, 1, FP32, True)
