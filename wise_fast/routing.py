"""Routing context: which tokens are prompt, and which memory each sequence keeps while it decodes.

The decision is taken per sequence where the prompt is prefilled and held with the key-value cache from then on, so a
decoded token never changes it. Hooks on the decoder see masks and caches; the edited projection asks this object.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from wise_fast.errors import PackError, WiseError
from wise_fast.pack_rows import PackRows
from wise_fast.turns import Turn


class RoutedCache:
    """Mixed into a cache's class once it holds a decision, so that the decision follows the cache's rows."""

    routing_choice: Tensor | None
    routing_numbering: int | None = None

    def _move(self, rows) -> None:
        if self.routing_choice is not None:
            self.routing_choice = rows(self.routing_choice)

    def reorder_cache(self, beam_idx: Tensor):
        self._move(lambda choice: choice.index_select(0, beam_idx.to(choice.device)))
        return super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int):
        self._move(lambda choice: choice.repeat_interleave(repeats, 0))
        return super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor):
        self._move(lambda choice: choice[indices])
        return super().batch_select_indices(indices)

    def reset(self):
        self.routing_choice = self.routing_numbering = None
        return super().reset()

    def __reduce__(self):
        return _restore, (type(self).__mro__[2],), self.__dict__


@functools.cache
def _routed(cls: type[Cache]) -> type[Cache]:
    return type(f"Routed{cls.__name__}", (RoutedCache, cls), {})


def _follow(cache: Cache) -> None:
    """Let the cache move its decision with its rows; a compiled prefill cannot and leaves it to the next forward."""
    if not torch.compiler.is_compiling() and not isinstance(cache, RoutedCache):
        cache.__class__ = _routed(type(cache))


def _restore(cls: type[Cache]) -> Cache:
    routed = _routed(cls)
    return routed.__new__(routed)


class Routing:
    """Per-model routing state, shared by the decoder's hooks and the edited projection.

    Attributes:
        enabled: False serves the main memory alone.
        mask: [B, T] bool of the current forward, True where a token belongs to the prompt; None for "all of them".
        ids: [B, T] token ids of the current forward while it decides; None where it was given embeddings.
        held: [B] int64 decision made at prefill that this forward must keep, or None.
        choice: [B] int64 decision of the latest forward: memory index, or -1 for the main memory; None when it asked
            for none (disabled, or no memories).
        scores: [B, J] fp32 of the latest prefill, or None likewise; of every memory, whether or not it may answer.
        thresholds: [J] or [B, J] fp32 that those were compared to.
        rows: [B] int64 of the current forward, what each sequence asks for (see `PackRows`); None where all ask alike.
        packs: what may be asked for.
        numbering: changes whenever memories get other indices, so that no cache goes on with another's.
        turn: of the threads that share the model.
        generating: whether a `generate` is at work.

    A forward decides on the tokens it is given. It keeps the cache's decision when it decodes: with one token, or with
    any number inside `generate` after its first forward. More tokens than one outside `generate` are a new prompt, so
    that a chat's next turn on top of its cache is routed by what that turn says, not by what was said before.

    `generate` calls of several threads take turns; bare forwards of several threads at once must not.
    """

    def __init__(self):
        self.enabled = True
        self.mask: Tensor | None = None
        self.ids: Tensor | None = None
        self.held: Tensor | None = None
        self.choice: Tensor | None = None
        self.scores: Tensor | None = None
        self.thresholds: Tensor | None = None
        self.rows: Tensor | None = None
        self.packs = PackRows()
        self.numbering = 0
        self.turn = Turn()
        self.generating = False
        self._prompt: Tensor | None = None
        self._first = False  # the generation's first forward is to come
        self._total: int | None = None
        self._prompt_length = 0
        self._parameters: tuple[str, ...] = ()
        self._handles: list = []

    def attach(self, decoder: nn.Module) -> None:
        """Watch the forwards of `decoder`."""
        self._parameters = tuple(inspect.signature(decoder.forward).parameters)
        self._handles = [
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after, with_kwargs=True, always_call=True),
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
    def generation(self, total: int | None = None) -> Iterator[None]:
        """Around one `generate` call: its first forward decides, also when a cache is handed in or none is used.

        Args:
            total: tokens of the prompt, with those in the cache, where the first forward may have drafted ones behind
                them. Compiled forwards are made for one number, so None where it cannot.
        """
        with self.turn:
            before = self.generating, self._first, self._prompt_length, self._total
            self.generating, self._first, self._total = True, True, total
            try:
                yield
            finally:
                self.generating, self._first, self._prompt_length, self._total = before

    def _given(self, args, kwargs) -> dict:
        return dict(zip(self._parameters, args, strict=False)) | kwargs

    def _before(self, _module, args, kwargs) -> None:
        self.mask = self.ids = self.held = self.choice = self.rows = None
        given = self._given(args, kwargs)
        if self.enabled and given.get("cu_seq_lens_q") is not None:
            raise WiseError(
                "several sequences are packed into one row (continuous batching, padding-free batches), and routing "
                "decides by the row; give each sequence a row of its own, as generate does"
            )
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        batch, length = tokens.shape[:2]
        cache = given.get("past_key_values")
        first = self._first
        kept = getattr(cache, "routing_choice", None)
        if kept is not None:
            _follow(cache)
        if kept is not None and not first and (length == 1 or self.generating):
            self._require_numbering(cache)
            if kept.shape[0] != batch:
                raise WiseError(
                    f"the cache holds routing decisions for {kept.shape[0]} sequences, but {batch} were given; "
                    "start from a fresh cache"
                )
            self.held = kept
            self.choice = kept if self.enabled else None
            return
        self.scores = self.thresholds = None
        self.ids = given.get("input_ids")
        if self.enabled:
            self.rows = self.packs.rows(batch, self.generating, tokens.device)
        self.mask = token_mask(given.get("attention_mask"), batch, length, cache, tokens.device)
        if self._prompt is not None:
            prompt = self._prompt.to(tokens.device)[:, :length]
            self.mask = self.mask & nn.functional.pad(prompt, (0, length - prompt.shape[1]), value=False)
        if first:
            self._first = False
            self._prompt_length = length - self._drafted(length, given.get("attention_mask"), cache)
        if self.generating:
            self.mask = self.mask & (torch.arange(length, device=tokens.device) < self._prompt_length)

    def _require_numbering(self, cache: Cache) -> None:
        # A compiled forward would compile again for every number; what compiles decoding is `generate`, in its turn.
        if torch.compiler.is_compiling() or not self.enabled:
            return
        if getattr(cache, "routing_numbering", None) not in (None, self.numbering):
            raise PackError(
                "packs or memories have come or gone since this cache's prompt was read, and its decision was between "
                "those before; start from a fresh cache"
            )

    def _drafted(self, length: int, mask, cache) -> int:
        """Tokens behind the prompt that an assistant has drafted already; it never does with a compileable cache."""
        if self._total is None or (cache is not None and cache.is_compileable):
            return 0
        two = isinstance(mask, Tensor) and mask.ndim == 2
        seen = mask.shape[1] if two else length + (0 if cache is None else cache.get_seq_length())
        return max(0, seen - self._total)

    def _after(self, _module, args, kwargs, output) -> None:
        mask, held = self.mask, self.held
        self.mask = self.ids = self.held = self.rows = None
        if output is None or held is not None:  # the forward raised, or the cache has its decision already
            return
        made = output if isinstance(output, tuple) else (getattr(output, "past_key_values", None),)
        candidates = (*made, self._given(args, kwargs).get("past_key_values"))
        cache = next((c for c in candidates if isinstance(c, Cache)), None)
        if cache is not None:
            _follow(cache)
            # What the main memory read, it goes on with, also when there is a side memory by then.
            choice = mask.new_full(mask.shape[:1], -1, dtype=torch.int64) if self.choice is None else self.choice
            cache.routing_choice = choice
            cache.routing_numbering = None if torch.compiler.is_compiling() else self.numbering


def token_mask(mask, batch: int, length: int, cache, device) -> Tensor:
    """[batch, length] bool of the current tokens that are not padding, from any mask form that transformers passes."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if not isinstance(mask, Tensor):
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    if mask.ndim == 2:
        return mask[:, mask.shape[1] - length :].bool()
    # 4D: a token that may not attend to itself is padding; key positions start behind what the cache holds.
    keys = torch.arange(length, device=mask.device)
    if cache is not None and cache.layers:
        layer = cache.is_sliding.index(False) if False in cache.is_sliding else 0
        keys = keys + cache.get_seq_length(layer) - cache.get_mask_sizes(length, layer)[1]
    own = mask[:, 0].gather(2, keys[None, :, None].expand(mask.shape[0], -1, 1))[..., 0]
    own = own if own.dtype == torch.bool else own == 0
    return own.expand(batch, length)


class Generation:
    """`model.generate` that tells the routing where a generation begins, and with `pack_names` which pack each of its
    sequences asks for; a method, so that deepcopy follows it.
    """

    def __init__(self, inner, routing: Routing):
        self.inner, self.routing = inner, routing

    def generate(self, *args, pack_names: Sequence[str] | None = None, **kwargs):
        model = getattr(self.inner, "__self__", None)  # none where the user replaced the method by a function
        config = next(iter(args[1:]), kwargs.get("generation_config")) or getattr(model, "generation_config", None)
        if kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None)) is not None:
            raise WiseError(
                "prefill_chunk_size is set: routing decides where the prompt is prefilled, and would know its first "
                "chunk alone; leave it unset"
            )
        given = _prompts(args, kwargs)
        sequences, device = (1, None) if given is None else (given.shape[0], given.device)
        total = given.shape[1] if given is not None and _drafts(config, kwargs) else None
        with self.routing.generation(total), self.routing.packs.naming(pack_names, sequences, device):
            return self.inner(*args, **kwargs)


def _drafts(config, kwargs) -> bool:
    """Whether an assistant, or a lookup in the prompt, drafts tokens that the model then checks."""
    settings = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
    return any(kwargs.get(name) or getattr(config, name, None) for name in settings)


def _prompts(args, kwargs) -> Tensor | None:
    """What `generate` is to go on from, [B, T, ...] with the tokens in a cache; None where it starts from nothing."""
    named = (kwargs.get(name) for name in ("attention_mask", "inputs_embeds", "input_ids", "inputs"))
    return next((tensor for tensor in (*named, *args[:1]) if isinstance(tensor, Tensor)), None)
