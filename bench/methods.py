"""The methods that are compared: ours, the plain WISE baseline, FT-L and GRACE, made by name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields

import torch
from torch import Tensor, nn

from bench.ftl import FTL, FTLConfig
from bench.grace import Grace, GraceConfig
from bench.plain_wise import PlainWise, PlainWiseConfig
from bench.projection import ProjectionMethod
from wise_fast import WiseConfig, WiseEditor, tokens
from wise_fast.architectures import evaluating
from wise_fast.errors import ConfigError

BASELINES = {"wise": (PlainWise, PlainWiseConfig), "ft-l": (FTL, FTLConfig), "grace": (Grace, GraceConfig)}
NAMES = ("wise_fast", *BASELINES)


class Ours(WiseEditor):
    """`WiseEditor` with what a run records of every method (see `ProjectionMethod`)."""

    name = "wise_fast"

    def settings(self) -> dict:
        return self.config.to_dict()

    @property
    def count(self) -> int:
        return len(self.memories)

    def tensors(self) -> list[Tensor]:
        return list(self.projection.buffers(recurse=False))

    @torch.no_grad()
    def ratios(self, prompts: Sequence[str], size: int = 16) -> list[float] | None:
        """Per prompt, the largest score / threshold over the memories."""
        if not self.memories:
            return None
        found: list[float] = []
        rows = [tokens.Example(tokens.encode(self.tokenizer, prompt), ()) for prompt in prompts]
        for first in range(0, len(rows), size):
            batch = tokens.collate(rows[first : first + size], tokens.pad_token(self.tokenizer), self.device)
            last = batch.prompt_mask.flatten().nonzero()[-1]
            with evaluating(self.model), self.routing.prompt(batch.prompt_mask), self.tail.head_at(last):
                self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            found += (self.routing.scores / self.routing.thresholds).amax(1).tolist()
        return found


Method = Ours | ProjectionMethod


def make_method(name: str, model: nn.Module, tokenizer, settings: Mapping[str, object] | None = None) -> Method:
    """A method of `NAMES` on a model that no other method is on.

    Raises:
        ConfigError: there is no such method, or a setting is unknown or out of range.
    """
    settings = dict(settings or {})
    if name == "wise_fast":
        return Ours(model, tokenizer, WiseConfig.from_dict(settings))
    if name not in BASELINES:
        raise ConfigError(f"no method {name!r}; there are: {', '.join(NAMES)}")
    method, config = BASELINES[name]
    known = [f.name for f in fields(config)]
    if unknown := sorted(set(settings) - set(known)):
        raise ConfigError(f"{name} has no setting {unknown[0]!r}; it has: {', '.join(known)}")
    try:
        return method(model, tokenizer, config(**settings))
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"settings of {name}: {error}") from error


def served(method: Method) -> int:
    """Bytes that serving holds beside the model."""
    return sum(tensor.nbytes for tensor in method.tensors())


def digest(method: Method) -> str:
    """SHA-256 of what editing made; of FT-L, which changes the model itself, of the changed matrix."""
    made = hashlib.sha256()
    tensors = method.tensors() or [method.projection.weight.data]
    for tensor in tensors:
        made.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        made.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return made.hexdigest()
