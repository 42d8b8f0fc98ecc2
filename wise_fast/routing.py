"""Routing context: which tokens are prompt, and which memory each sequence keeps while it decodes.

The decision is taken per sequence where the prompt is prefilled and held with the key-value cache from then on, so a
decoded token never changes it. Hooks on the decoder see masks and caches; the edited projection asks this object.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from wise_fast.errors import WiseError


class RoutedCache:
    """Mixed into a cache's class once it holds a decision, so that the decision follows the cache's rows."""

    routing_choice: Tensor

    def reorder_cache(self, beam_idx: Tensor):
        self.routing_choice = self.routing_choice.index_select(0, beam_idx.to(self.routing_choice.device))
        return super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int):
        self.routing_choice = self.routing_choice.repeat_interleave(repeats, 0)
        return super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor):
        self.routing_choice = self.routing_choice[indices]
        return super().batch_select_indices(indices)

    def reset(self):
        self.routing_choice = None
        return super().reset()


@functools.cache
def _routed(cls: type[Cache]) -> type[Cache]:
    return type(f"Routed{cls.__name__}", (RoutedCache, cls), {})


class Routing:
    """Per-model routing state, shared by the decoder's hooks and the edited projection.

    Attributes:
        enabled: False serves the main memory alone.
        mask: [B, T] bool of the current forward, True where a token belongs to the prompt; None for "all of them".
        held: [B] int64 decision made at prefill that this forward must keep, or None.
        choice: [B] int64 decision of the latest forward: memory index, or -1 for the main memory.
        scores: [B, J] fp32 of the latest prefill.
    """

    def __init__(self):
        self.enabled = True
        self.mask: Tensor | None = None
        self.held: Tensor | None = None
        self.choice: Tensor | None = None
        self.scores: Tensor | None = None
        self._prompt: Tensor | None = None
        self._generating = False
        self._prompt_length: int | None = None
        self._parameters: tuple[str, ...] = ()
        self._handles: list = []

    def attach(self, decoder: nn.Module) -> None:
        """Watch the forwards of `decoder`."""
        self._parameters = tuple(inspect.signature(decoder.forward).parameters)
        self._handles = [
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after, with_kwargs=True),
        ]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def disabled(self) -> Iterator[None]:
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    @contextmanager
    def prompt(self, mask: Tensor) -> Iterator[None]:
        """Say which tokens are prompt, [B, T] bool; later columns of a longer forward are not."""
        before, self._prompt = self._prompt, mask
        try:
            yield
        finally:
            self._prompt = before

    @contextmanager
    def generation(self) -> Iterator[None]:
        """Around one `generate` call: its first forward decides, also when a cache is handed in or none is used."""
        before = self._generating, self._prompt_length
        self._generating, self._prompt_length = True, None
        try:
            yield
        finally:
            self._generating, self._prompt_length = before

    def _before(self, _module, args, kwargs) -> None:
        given = dict(zip(self._parameters, args, strict=False)) | kwargs
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        batch, length = tokens.shape[:2]
        cache = given.get("past_key_values")
        first = self._generating and self._prompt_length is None
        kept = getattr(cache, "routing_choice", None)
        self.held = None if first or kept is None or (length > 1 and not self._generating) else kept
        self.mask = None
        if self.held is not None:
            if self.held.shape[0] != batch:
                raise WiseError(
                    f"the cache holds routing decisions for {self.held.shape[0]} sequences, but {batch} were given; "
                    "start from a fresh cache"
                )
            return
        self.mask = token_mask(given.get("attention_mask"), batch, length, cache, tokens.device)
        if self._prompt is not None:
            prompt = self._prompt.to(tokens.device)[:, :length]
            self.mask = self.mask & nn.functional.pad(prompt, (0, length - prompt.shape[1]), value=False)
        if first:
            self._prompt_length = length
        elif self._generating:
            self.mask = self.mask & (torch.arange(length, device=tokens.device) < self._prompt_length)

    def _after(self, _module, args, kwargs, output) -> None:
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            cache = (dict(zip(self._parameters, args, strict=False)) | kwargs).get("past_key_values")
        if isinstance(cache, Cache) and self.choice is not None:
            if not isinstance(cache, RoutedCache):
                cache.__class__ = _routed(type(cache))
            cache.routing_choice = self.choice
        self.mask = self.held = None


def token_mask(mask, batch: int, length: int, cache, device) -> Tensor:
    """[batch, length] bool of the current tokens that are not padding, from any mask form that transformers passes."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if not isinstance(mask, Tensor):
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    if mask.ndim == 2:
        return mask[:, mask.shape[1] - length :].bool()
    # 4D: a token that may not attend to itself is padding; key positions start behind what the cache holds.
    seen = cache.get_seq_length() if cache is not None else 0
    keys = torch.arange(length, device=mask.device) + seen
    own = mask[:, 0].gather(2, keys[None, :, None].expand(mask.shape[0], -1, 1))[..., 0]
    own = own if own.dtype == torch.bool else own == 0
    return own.expand(batch, length)
