"""The plain PyTorch baseline: WISE (arXiv 2405.14768) as its reference implementation runs it, written from the paper.

Faults of the reference implementation kept here, because they are costs: the whole model at every step and row
(bare, k prefixed, irrelevant), logits at all positions; dense W', gradient, mask multiply and clamp; the loss read on
the host at every step; a fixed number of steps; one edit at a time; a dense copy per memory; three dense matmuls to
serve one (`live_matmul=False` drops that of live W', which nothing uses); host syncs in every forward, also when
decoding; one decision per batch, from the averaged norm, so that exact routing means one prompt a forward.

Not kept, because they only make quality unfairly bad: padding in averages, another rule above 100 tokens; activation
functions on layer outputs; weight decay outside the mask; fixed 0.4/0.6 weights at later merges (shard counts here);
global history; unseeded masks; decisions that flip in decoding; labels on prompt tokens; Conv1D crashes; `eval`.

Neither: targets have no end-of-sequence token, and eps is the plain minimum over the edits, failed ones included (both
the paper's); autograd stops at the edited layer (only W' wants a gradient); scores of edits are over prompt tokens.
"""

import argparse
import json
import os.path
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_SEEDS = ("The", "Therefore", "Because", "I", "You", "It", "In", "When", "A", "We")


@dataclass
class BaselineConfig:
    """Settings; the defaults are the paper's for ZsRE on LLaMA-2-7B. `layer` is the index of the edited layer."""

    layer: int
    mask_ratio: float = 0.2
    lr: float = 1.0
    steps: int = 70
    alpha: float = 5.0
    beta: float = 20.0
    gamma: float = 10.0
    prefixes: int = 10
    prefix_tokens: int = 10
    shard_size: int = 500
    shards: int = 2
    act_ratio: float = 0.88
    density: float = 0.53
    norm_constraint: float = 1.0
    live_matmul: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not (
            0 < self.mask_ratio <= 1 and 0 < self.density <= 1 and min(self.steps, self.shard_size, self.shards) > 0
        ):
            raise ValueError(f"mask_ratio and density lie in (0, 1]; steps, shard_size and shards start at 1: {self}")


@dataclass
class EditTiming:
    """One edit: wall seconds, steps, seconds per step, and the loss seen by the last step (before its update)."""

    seconds: float
    steps: int
    seconds_per_step: float
    final_loss: float


@dataclass
class Memory:
    """A dense side memory, the scores of its edits, and the number of shards that it stands for."""

    weight: Tensor
    scores: list[float] = field(default_factory=list)
    shards: int = 1


def ties_merge(deltas: Sequence[Tensor], density: float = 0.53, weights: Sequence[float] | None = None) -> Tensor:
    """TIES (arXiv 2306.01708) of dense deltas of one shape: trim, elect the sign, disjoint mean.

    Trim keeps the `density` largest magnitudes of each whole delta; the sign is that of the weighted sum (an exact tie
    elects none and gives 0); the mean, weighted too, is over the trimmed entries that agree: equal weights cancel.
    """
    stacked = torch.zeros(len(deltas), deltas[0].numel(), dtype=deltas[0].dtype, device=deltas[0].device)
    for row, delta in zip(stacked, deltas, strict=True):
        keep = delta.abs().flatten().topk(max(1, round(density * delta.numel()))).indices
        row[keep] = delta.flatten()[keep]
    weight = stacked.new_tensor(weights or [1.0] * len(deltas))[:, None]
    agree = weight * ((stacked != 0) & (stacked.sign() == (weight * stacked).sum(0).sign()))
    return ((agree * stacked).sum(0) / agree.sum(0).clamp_min(1e-12)).view_as(deltas[0])


def row_scores(norms: Tensor, mask: Tensor) -> Tensor:
    """A row's score [B]: the mean of its token norms (eq. 3) [B, L] over the tokens of `mask` [B, L]."""
    return (norms * mask).sum(-1) / mask.sum(-1).clamp_min(1)


class SideMemoryLayer(nn.Module):
    """Stands in for the projection: [B, L, d_ff] to [B, L, d_out], by W' while editing, else by the routed memory."""

    def __init__(self, original: nn.Linear | Conv1D, config: BaselineConfig) -> None:
        super().__init__()
        self.original, self.config = original, config
        self.live = nn.Parameter(original.weight.detach().clone(), requires_grad=False)
        self.memories: list[Memory] = []
        self.editing = self.decoding = False
        self.mask = self.norms = self.choice = None

    def _project(self, a: Tensor, weight: Tensor) -> Tensor:
        return F.linear(a, weight.T if isinstance(self.original, Conv1D) else weight, self.original.bias)

    def forward(self, a: Tensor) -> Tensor:
        main = self.original(a)
        if self.editing:
            side = self._project(a, self.live)
            self.norms = (side - main).float().norm(dim=-1)
            return side
        if self.memories and self.config.live_matmul:
            self._project(a, self.live)
        mask = torch.ones(a.shape[:-1], device=a.device) if self.mask is None else self.mask
        sides = [self._project(a, memory.weight) for memory in self.memories]
        scores = [row_scores((side - main).float().norm(dim=-1), mask).mean().item() for side in sides]
        if not self.decoding:
            eps = [self.config.act_ratio * min(memory.scores, default=float("inf")) for memory in self.memories]
            ratios = [score / max(e, 1e-12) for score, e in zip(scores, eps, strict=True)]
            self.choice = ratios.index(max(ratios)) if max(ratios, default=0) > 1 else None
        return main if self.choice is None else sides[self.choice]


class BaselineWISE:
    """WISE on one projection of `model`: `edit`, `merge`, and `attach` / `detach` (or `with`) to serve.

    `projection` is the path of an nn.Linear or Conv1D ("model.layers.13.mlp.down_proj", or with "{}" for the layer).
    `prefixes` replaces the prefixes that the model otherwise generates, once, before its first edit.
    """

    layer_class = SideMemoryLayer

    def __init__(
        self, model: nn.Module, tokenizer, config: BaselineConfig, projection: str, prefixes: list[str] | None = None
    ) -> None:
        path = projection.format(config.layer)
        if str(config.layer) not in path.split("."):
            raise ValueError(f"projection {path!r} does not lie in layer {config.layer} of the config")
        parent, _, self._name = path.rpartition(".")
        self._parent, self._original = model.get_submodule(parent), model.get_submodule(path)
        if not isinstance(self._original, (nn.Linear, Conv1D)):
            raise TypeError(f"{path} is a {type(self._original).__name__}; expected nn.Linear or transformers' Conv1D")
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self._layer = self.layer_class(self._original, config)
        self._generator = torch.Generator().manual_seed(config.seed)
        self._prefixes, self._hook = prefixes, None
        self._open, self._mask, self._closed = None, None, 0

    def edit(self, requests: Iterable[Mapping[str, str]]) -> list[EditTiming]:
        """Write each request (prompt, target, irrelevant) in turn; shards close, and merge, as the config says."""
        requests = list(requests)
        for index, request in enumerate(requests):
            if missing := [key for key in ("prompt", "target", "irrelevant") if not request.get(key)]:
                raise ValueError(f"request {index} has no {missing}: give prompt, target and irrelevant as text")
        attached, training = self._hook is not None, self.model.training
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        try:
            self.attach().model.eval().requires_grad_(False)
            self._prefixes = self._generate_prefixes() if self._prefixes is None else self._prefixes
            return [self._edit_one(request) for request in requests]
        finally:
            self._layer.editing = self._layer.live.requires_grad = False
            self._layer.norms = self._layer.live.grad = None
            if not attached:
                self.detach()
            self.model.train(training)
            for parameter in trainable:
                parameter.requires_grad_(True)

    def merge(self) -> None:
        """TIES-merge all memories, the one merged before included (weighted by its shards), into one."""
        if not self._layer.memories:
            raise ValueError("nothing to merge: edit first")
        parts, main = self._layer.memories, self._original.weight.detach()
        delta = ties_merge([(p.weight - main).float() for p in parts], self.config.density, [p.shards for p in parts])
        scores, shards = [score for part in parts for score in part.scores], sum(part.shards for part in parts)
        self._layer.memories = [Memory((main.float() + delta).to(main.dtype), scores, shards)]
        self._open, self._closed = None, 0

    def attach(self) -> "BaselineWISE":
        """Put the side memory in the model: model(...) and model.generate(...) then serve it."""
        if self._hook is None:
            setattr(self._parent, self._name, self._layer)
            self._hook = self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        return self

    def detach(self, *_: object) -> None:
        """Put the original projection back."""
        if self._hook is not None:
            setattr(self._parent, self._name, self._original)
            self._hook = self._hook.remove()

    __enter__, __exit__ = attach, detach

    def _before_forward(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        mask, cache = kwargs.get("attention_mask", args[1] if len(args) > 1 else None), kwargs.get("past_key_values")
        self._layer.decoding = cache is not None and bool(cache.get_seq_length() > 0)
        self._layer.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 and not self._layer.decoding else None

    def _edit_one(self, request: Mapping[str, str]) -> EditTiming:
        start, layer, config, main = time.perf_counter(), self._layer, self.config, self._original.weight.detach()
        if self._open is None:
            self._mask = (torch.rand(main.shape, generator=self._generator) < config.mask_ratio).to(main)
            self._open, layer.live.data = Memory(main), main.clone()
            layer.memories.append(self._open)
        ids, mask, prompt, labels = self._batch(request)
        layer.editing, began = True, time.perf_counter()
        loss = self._optimise(ids, mask, prompt, labels)  # ends in an .item(), which waits for the device
        per_step = (time.perf_counter() - began) / config.steps
        with torch.no_grad():
            self.model(input_ids=ids[:1], attention_mask=mask[:1], use_cache=False)
        layer.editing, score = False, row_scores(layer.norms, prompt[:1]).item()
        self._open.weight = layer.live.data
        self._open.scores.append(score)
        if len(self._open.scores) == config.shard_size:
            self._open, self._closed = None, self._closed + 1
            if self._closed == config.shards:
                self.merge()
        return EditTiming(time.perf_counter() - start, config.steps, per_step, loss)

    @torch.enable_grad()
    def _optimise(self, ids: Tensor, mask: Tensor, prompt: Tensor, labels: Tensor) -> float:
        """SGD on the target's NLL plus eq. 5, its hinges averaged over the edit's rows (the last row is irrelevant)."""
        config, live, main = self.config, self._layer.live.requires_grad_(True), self._original.weight.detach()
        optimiser = torch.optim.SGD([live], lr=config.lr)
        for _ in range(config.steps):
            optimiser.zero_grad()
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            nll = F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten())
            edit, irrelevant = row_scores(self._layer.norms, prompt).tensor_split([-1])
            hinges = F.relu(irrelevant - config.alpha) + F.relu(config.beta - edit)
            loss = nll + (hinges + F.relu(config.gamma - (edit - irrelevant))).mean()
            loss.backward()
            live.grad.mul_(self._mask)
            optimiser.step()
            live.data = torch.clamp(live.data, main - config.norm_constraint, main + config.norm_constraint)
            value = loss.item()
        return value

    def _batch(self, request: Mapping[str, str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Right-padded ids, attention mask, prompt mask and labels [R, L]: bare, prefixed and irrelevant rows."""
        target, rows = request["target"], []
        for prefix in ["", *self._prefixes[: self.config.prefixes]]:
            prompt = f"{prefix}. {request['prompt']}" if prefix else request["prompt"]
            ids = self.tokenizer(prompt + (target if target[0].isspace() else " " + target))["input_ids"]
            shared = os.path.commonprefix([ids, self.tokenizer(prompt)["input_ids"]])
            rows.append((ids, min(len(shared), len(ids) - 1)))
        rows.append((ids := self.tokenizer(request["irrelevant"])["input_ids"], len(ids)))
        length, pad = max(len(ids) for ids, _ in rows), getattr(self.tokenizer, "pad_token_id", None) or 0
        ids, place = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows]), torch.arange(length)
        mask = place < torch.tensor([len(ids) for ids, _ in rows])[:, None]
        prompt = place < torch.tensor([count for _, count in rows])[:, None]
        labels = ids.masked_fill(prompt | ~mask, -100)
        return tuple(tensor.to(self.model.device) for tensor in (ids, mask.long(), prompt, labels))

    @torch.no_grad()
    def _generate_prefixes(self) -> list[str]:
        """Prefixes sampled (top 5) from the unedited model after short seeds, with the seeded generator."""
        prefixes = []
        for index in range(self.config.prefixes):
            ids = torch.tensor([self.tokenizer(_SEEDS[index % len(_SEEDS)])["input_ids"]], device=self.model.device)
            for _ in range(self.config.prefix_tokens):
                logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1]
                top = logits.float().cpu().topk(5)
                pick = torch.multinomial(top.values.softmax(-1), 1, generator=self._generator)
                ids = torch.cat([ids, top.indices[pick].to(ids)[None]], dim=1)
            prefixes.append(" ".join(self.tokenizer.decode(ids[0].tolist(), skip_special_tokens=True).split()))
        return prefixes


def main(arguments: Sequence[str] | None = None) -> None:
    """Time the edits of a file, and print one JSON object."""
    from wise_fast.data import load_edits
    from wise_fast.models import load_model

    parser = argparse.ArgumentParser(description="time the plain PyTorch WISE baseline")
    parser.add_argument("--model", required=True, help="path of a model, or 'demo'")
    parser.add_argument("--edits", required=True, help="JSON file of edits")
    for name, default in {"limit": 1, "steps": 70, "layer": None}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--projection", default="model.layers.{}.mlp.down_proj", help="module path, {} for the layer")
    options = parser.parse_args(arguments)
    model, tokenizer = load_model(options.model)
    layer = model.config.num_hidden_layers * 27 // 32 if options.layer is None else options.layer
    baseline = BaselineWISE(model, tokenizer, BaselineConfig(layer, steps=options.steps), options.projection)
    timings = baseline.edit(vars(edit) for edit in load_edits(options.edits, limit=options.limit))
    row = {"model": options.model, "dtype": str(model.dtype), "device": str(model.device), "torch": torch.__version__}
    row |= {"threads": torch.get_num_threads(), "projection": options.projection, "config": asdict(baseline.config)}
    row["seconds_per_edit"] = sum(timing.seconds for timing in timings) / len(timings)
    print(json.dumps(row | {"edits": [asdict(timing) for timing in timings]}, indent=2))


if __name__ == "__main__":
    main()
