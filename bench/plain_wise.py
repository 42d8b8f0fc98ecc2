"""The plain PyTorch WISE baseline as a method that is scored like ours: decisions per sequence, held while decoding.

`bench.baseline_wise` edits as it always does. Serving differs from it in one thing: it decides once for a whole batch,
which would score it unfairly in batches of unlike prompts, so here every sequence has its own decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bench.baseline_wise import BaselineConfig, BaselineWISE, SideMemoryLayer, row_scores
from bench.measure import UNRELATED
from bench.projection import ProjectionMethod
from wise_fast import tokens
from wise_fast.data import Edit
from wise_fast.routing import Routing


@dataclass
class PlainWiseConfig(BaselineConfig):
    """The baseline's settings, the paper's; `layer` None takes ours. Its targets end without a stop token."""

    layer: int | None = None
    stop: str = "none"


class RowwiseLayer(SideMemoryLayer):
    """The baseline's layer with one decision a sequence; `ratios` [B] are the latest prompts' largest score / eps."""

    def __init__(self, original: nn.Module, config: BaselineConfig):
        super().__init__(original, config)
        self.routing: Routing | None = None
        self.ratios: Tensor | None = None

    def forward(self, a: Tensor) -> Tensor:
        if self.editing:
            return super().forward(a)
        main = self.original(a)
        if not self.memories or not self.routing.enabled:
            return main
        if self.config.live_matmul:
            self._project(a, self.live)
        sides = torch.stack([self._project(a, memory.weight) for memory in self.memories])
        choice = self.routing.held
        if choice is None:
            choice = self.routing.choice = self._decide(sides - main)
        rows = choice.shape[0]
        sides, flat = sides.view(len(sides), rows, -1, main.shape[-1]), main.reshape(rows, -1, main.shape[-1])
        chosen = sides[choice.clamp_min(0), torch.arange(rows, device=a.device)]
        return torch.where((choice >= 0)[:, None, None], chosen, flat).view_as(main)

    def _decide(self, side: Tensor) -> Tensor:
        """Per sequence, the memory with the largest score / eps, or -1 if none is above 1, of responses [J, ..., d]."""
        mask = self.routing.mask
        norms = side.float().norm(dim=-1).view(len(side), *mask.shape)
        eps = [self.config.act_ratio * min(memory.scores, default=float("inf")) for memory in self.memories]
        scores = torch.stack([row_scores(part, mask) for part in norms], 1)
        self.ratios, best = (scores / scores.new_tensor(eps).clamp_min(1e-12)).max(1)
        return torch.where(self.ratios > 1, best, -1)


class _Rowwise(BaselineWISE):
    layer_class = RowwiseLayer


class PlainWise(ProjectionMethod):
    """The paper's algorithm in plain PyTorch on the projection that `WiseEditor` would edit."""

    name = "wise"
    routed = True

    def __init__(self, model: nn.Module, tokenizer, config: PlainWiseConfig | None = None):
        super().__init__(model, tokenizer, PlainWiseConfig() if config is None else config)
        self.config = replace(self.config, layer=self.architecture.layer)
        self.baseline = _Rowwise(model, tokenizer, self.config, self.architecture.projection)
        self.layer: RowwiseLayer = self.baseline._layer
        self.layer.routing = self.routing
        self.baseline.attach()

    @property
    def count(self) -> int:
        return len(self.layer.memories)

    def tensors(self) -> list[Tensor]:
        """The dense memories, and live W' unless it is the open one."""
        held = [memory.weight for memory in self.layer.memories]
        live = self.layer.live.data
        return held if any(live.data_ptr() == weight.data_ptr() for weight in held) else [*held, live]

    def ratios(self, prompts: Sequence[str]) -> list[float] | None:
        """Largest score / eps over the memories."""
        if not self.count:
            return None
        return [ratio for _ in self._forward_prompts(prompts) for ratio in self.layer.ratios.tolist()]

    def unload(self) -> nn.Module:
        self.baseline.detach()
        return super().unload()

    def _learn(self, edit: Edit, row: tokens.Example) -> tuple[int, str]:
        irrelevant = edit.irrelevant or UNRELATED[len(self.edits) % len(UNRELATED)]
        request = {"prompt": edit.prompt, "target": edit.target, "irrelevant": irrelevant}
        (timing,) = self.baseline.edit([request])
        return timing.steps, ""
