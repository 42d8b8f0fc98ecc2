"""Decoding with a whole 7B-shaped model, random weights, all 32 layers: unedited beside edited, for `bench.gpu`.

Nothing is trained: the projection of one late layer is served with random memories by the same module, routing and
cache as in an edited model. A decode step is captured in a CUDA graph where the model can be.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from bench.gpu_banks import Place, make_bank
from bench.gpu_timing import Arm
from wise_fast.ffn import DualMemoryLinear
from wise_fast.memory import Bank

LAYER, PROMPT, ROOM = 27, 128, 8
MODEL = "Llama-2-7B"


def seven_billion(place: Place) -> LlamaForCausalLM:
    """Llama-2-7B's shape in bf16 with random weights; in a dry run the same code with a thousandth of it."""
    outputs, width = place.shape(MODEL)
    config = LlamaConfig(
        hidden_size=outputs,
        intermediate_size=width,
        num_hidden_layers=32,
        num_attention_heads=32 if place.full else 4,
        num_key_value_heads=32 if place.full else 4,
        vocab_size=32000 if place.full else 128,
        max_position_embeddings=2048,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(place.device):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


@dataclass
class Step:
    """A decode step of `batch` sequences over a cache that holds their prompts; every call decodes the same token."""

    model: nn.Module
    batch: int

    def __post_init__(self):
        device = self.model.device
        ids = torch.randint(self.model.config.vocab_size, (self.batch, PROMPT), device=device)
        self.cache = StaticCache(config=self.model.config, max_cache_len=PROMPT + ROOM)
        self.model(input_ids=ids, past_key_values=self.cache, logits_to_keep=1)
        self.token = ids[:, -1:].clone()
        self.place = torch.full((1, 1), PROMPT, device=device)
        found = (getattr(layer, "cumulative_length", None) for layer in self.cache.layers)
        self.lengths = [length for length in found if isinstance(length, Tensor)]

    def call(self) -> Tensor:
        given = {"position_ids": self.place.expand(self.batch, 1), "past_key_values": self.cache}
        return self.model(input_ids=self.token, **given).logits

    def rewind(self) -> None:
        """Forget the token decoded last: some versions of the cache count, and have room for PROMPT + ROOM."""
        for length in self.lengths:
            length.fill_(PROMPT)


class Served:
    """One model whose late projection is unedited or stands beside a bank, switched between calls, never in them."""

    def __init__(self, model: LlamaForCausalLM):
        self.model, self.mlp = model, model.model.layers[LAYER].mlp
        self.base, self.now = self.mlp.down_proj, None

    def switch(self, module: DualMemoryLinear | None) -> None:
        """Serve with `module`, hooks and all, as an editor attaches it; None is the unedited model."""
        if self.now is not None:
            self.now.routing.detach()
        self.mlp.down_proj, self.now = module or self.base, module
        if module is not None:
            module.routing.attach(self.model.model)

    def arm(self, batch: int, bank: Bank | None) -> Arm:
        """A decode step after prefilling; in scope where the bank's thresholds let everything in."""
        module = None
        if bank is not None:
            module = DualMemoryLinear(self.base)
            module.set_bank(bank)
        self.switch(module)
        step = Step(self.model, batch)
        if module is not None and bool((module.routing.choice >= 0).all()) != bool((bank.thresholds < 1).all()):
            raise RuntimeError(f"prompts were routed to {module.routing.choice.tolist()}")

        def before() -> None:
            if self.now is not module:
                self.switch(module)
            step.rewind()

        return Arm(torch.no_grad()(step.call), before=before)


@torch.no_grad()
def arms(served: Served, place: Place, layout: str, memories: int, batch: int) -> dict[str, Arm]:
    """A decode step of `batch` sequences: unedited, edited out of scope, edited in scope; each has its own cache."""
    made = make_bank(place, layout, MODEL, memories, torch.bfloat16, dense=False)
    found = {"unedited": served.arm(batch, None)}
    for name, threshold in (("out of scope", torch.inf), ("in scope", 1e-20)):
        bank = Bank(*made.arguments, torch.full((memories,), threshold, device=place.device), None)
        found[name] = served.arm(batch, bank)
    return found


def moved(model: LlamaForCausalLM) -> float:
    """Bytes of weights that a decode step reads."""
    return float(sum(p.nbytes for p in model.parameters()) - model.model.embed_tokens.weight.nbytes)


CASES = [(layout, memories, batch) for batch in (1, 8) for layout, memories in (("neuron", 1), ("element", 1))]
CASES.append(("neuron", 16, 1))
