"""GRACE: a codebook of edits beside the same projection (Hartvigsen et al. 2023, arXiv 2211.11031), from the paper.

An entry is a key (the projection's input at the last prompt token of an edit), a value (what the projection returns
there instead), a deferral radius and the edit's label. A prompt whose key is nearest to entry i, and within its radius,
gets value i at its last token; any other prompt passes untouched. Learning an edit with key h, its nearest entry being
i at distance d:

* d > radius_i + radius: a new entry, with the initial radius;
* else, same label: `expand`, radius_i = max(radius_i, d), and nothing is trained;
* else: `split`, radius_i = min(radius_i, d / 2), and a new entry with min(radius, d / 2). At d = 0 no radius can tell
  them apart, so the new value takes the old one's place.

Ours to decide, as codebases differ: the value replaces the output at the last prompt token alone, and starts from the
projection's own output there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.projection import ProjectionMethod
from wise_fast import tokens
from wise_fast.data import Edit
from wise_fast.errors import ConfigError
from wise_fast.routing import Routing

_SAME = 1e-5  # keys nearer than this share of their norm are one: batches of other shapes round differently
_MOST = 1e6  # ratio of a prompt that is a key itself


@dataclass(frozen=True)
class GraceConfig:
    """Settings; the defaults are the ones usual with the paper's code.

    Attributes:
        layer, stop: as in `WiseConfig`; the stop token is trained after the target, as ours does.
        radius: initial deferral radius, a Euclidean distance of projection inputs. It depends on the model.
        steps, lr: of Adam on the value; `lr` in the units of the projection's output.
        nll: an edit stops once its target's mean token NLL is at most this.
    """

    layer: int | None = None
    radius: float = 1.0
    steps: int = 100
    lr: float = 1.0
    nll: float = 1e-2
    stop: str = "auto"

    def __post_init__(self) -> None:
        if not (self.radius > 0 and self.steps >= 1 and self.lr > 0 and self.nll >= 0):
            raise ConfigError(f"GRACE needs radius > 0, steps >= 1, lr > 0 and nll >= 0, got {self}")


@dataclass
class Codebook:
    """Keys [n, d_ff], values [n, d_out] and radii [n], fp32, with the label of each entry."""

    keys: Tensor
    values: Tensor
    radii: Tensor
    labels: list[str] = field(default_factory=list)

    def nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Distance to, and index of, the nearest key of each query [B, d_ff]: both [B]."""
        exact = "donot_use_mm_for_euclid_dist"  # or the distance of a key to itself is not near 0
        return torch.cdist(queries.float(), self.keys, compute_mode=exact).min(1)

    def add(self, key: Tensor, value: Tensor, radius: float, label: str) -> None:
        self.keys, self.values = torch.cat([self.keys, key[None]]), torch.cat([self.values, value[None]])
        self.radii = torch.cat([self.radii, self.radii.new_tensor([radius])])
        self.labels.append(label)


class CodebookLinear(nn.Module):
    """The projection with a codebook beside it: [..., d_ff] to [..., d_out]. Decoded tokens are never looked up.

    `distances` and `nearest` [B] are of the latest prompt.
    """

    def __init__(self, base_layer: nn.Module, routing: Routing, codebook: Codebook):
        super().__init__()
        self.base_layer, self.routing, self.codebook = base_layer, routing, codebook
        self.distances = self.nearest = None

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, a: Tensor) -> Tensor:
        y, mask = self.base_layer(a), self.routing.mask
        if not self.routing.enabled or not self.codebook.labels or self.routing.held is not None or mask is None:
            return y
        last = last_prompt(mask)
        rows = torch.arange(len(last), device=a.device)
        self.distances, self.nearest = self.codebook.nearest(a.reshape(*mask.shape, -1)[rows, last].detach())
        hit = (self.distances <= self.codebook.radii[self.nearest]) & mask.any(1)
        self.routing.choice = torch.where(hit, self.nearest, -1)
        out = y.clone()
        out.view(*mask.shape, -1)[rows[hit], last[hit]] = self.codebook.values[self.nearest[hit]].to(y.dtype)
        return out


def last_prompt(mask: Tensor) -> Tensor:
    """Index [B] of the last True of each row of `mask` [B, T]; 0 of a row that has none."""
    return (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)


class Grace(ProjectionMethod):
    """GRACE on the projection; see the module's docstring."""

    name = "grace"
    routed = True

    def __init__(self, model: nn.Module, tokenizer, config: GraceConfig | None = None):
        super().__init__(model, tokenizer, GraceConfig() if config is None else config)
        empty = torch.zeros(0, device=self.device)
        width = self.architecture
        self.codebook = Codebook(empty.view(0, width.d_ff), empty.view(0, width.d_out), empty)
        parent, attribute = width.holder
        self._holder = model.get_submodule(parent), attribute
        self.layer = CodebookLinear(self.projection, self.routing, self.codebook)
        setattr(*self._holder, self.layer)

    @property
    def count(self) -> int:
        return len(self.codebook.labels)

    def tensors(self) -> list[Tensor]:
        return [self.codebook.keys, self.codebook.values, self.codebook.radii]

    def ratios(self, prompts: Sequence[str]) -> list[float] | None:
        """Radius of the nearest entry over the distance to it, at most 1e6."""
        if not self.count:
            return None
        found: list[float] = []
        for _ in self._forward_prompts(prompts):
            radii, distances = self.codebook.radii[self.layer.nearest], self.layer.distances
            found += (radii / distances.clamp_min(1e-12)).clamp_max(_MOST).tolist()
        return found

    def unload(self) -> nn.Module:
        setattr(*self._holder, self.projection)
        return super().unload()

    def _learn(self, edit: Edit, row: tokens.Example) -> tuple[int, str]:
        batch, book, label = self._batch([row]), self.codebook, edit.target
        capture = self.tail.capture(batch.input_ids, batch.attention_mask)
        last = last_prompt(batch.prompt_mask)
        key, main = capture.a[last][0].float(), capture.main
        if not book.labels:
            value, steps = self._train(capture, batch, last, main)
            book.add(key, value, self.config.radius, label)
            return steps, "new entry"
        distance, nearest = (found.item() for found in book.nearest(key[None]))
        if distance > book.radii[nearest].item() + self.config.radius:
            value, steps = self._train(capture, batch, last, main)
            book.add(key, value, self.config.radius, label)
            return steps, "new entry"
        if book.labels[nearest] == label:
            reach = distance + _SAME * float(key.norm())
            book.radii[nearest] = max(book.radii[nearest].item(), reach)
            return 0, "expanded the nearest entry"
        value, steps = self._train(capture, batch, last, main)
        if distance <= _SAME * float(key.norm()):
            book.values[nearest], book.labels[nearest] = value, label
            return steps, "replaced an entry"
        book.radii[nearest] = min(book.radii[nearest].item(), distance / 2)
        book.add(key, value, min(self.config.radius, distance / 2), label)
        return steps, "split the nearest entry"

    def _train(self, capture, batch: tokens.Batch, last: Tensor, main: Tensor) -> tuple[Tensor, int]:
        """The value [d_out] that makes the target likely, and the steps it took."""
        value = main[last][0].float().clone().requires_grad_(True)
        optimiser = torch.optim.Adam([value], lr=self.config.lr)
        here = torch.zeros(len(main), 1, dtype=torch.bool, device=main.device)
        here[last] = True
        for steps in range(self.config.steps + 1):
            y = torch.where(here, value, main.float()).to(main.dtype)
            loss = F.cross_entropy(self.tail.replay(capture, y, batch.positions).float(), batch.labels)
            if steps == self.config.steps or loss.item() <= self.config.nll:
                break
            (value.grad,) = torch.autograd.grad(loss, value)
            optimiser.step()
        return value.detach(), steps
