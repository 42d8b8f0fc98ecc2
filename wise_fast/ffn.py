"""The drop-in module: an FFN's value projection with side memories beside it (paper, eq. 3 to 6)."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import wise_kernels as kernels
from wise_fast import capacity, place
from wise_fast.architectures import is_linear, linear_shape, linear_weight
from wise_fast.errors import ConfigError, PackError, UnsupportedModelError
from wise_fast.memory import Bank
from wise_fast.routing import Routing
from wise_fast.scope import narrowed
from wise_fast.subjects import SPELLINGS, named

logger = logging.getLogger(__name__)

_NAMED = ("names", "about", "endings", "alike", "owners")  # of subjects, as `named` wants them
_BUFFERS = ("values", "index", "bounds", "thresholds", "factors", "leveraged", "last_limits", *_NAMED)
_ALL = (*_BUFFERS[:6], "limits", *_BUFFERS[6:])  # of a bank, in its order
_EXACT = ("thresholds", "factors", "limits", "last_limits", "endings", "alike")  # what decides the routing


class DualMemoryLinear(nn.Module):
    """Main memory (the original projection) and a bank of side memories behind one `forward`.

    `forward(a)` takes [..., d_ff] and returns [..., d_out]: per sequence, the main memory's output if every score is
    at most its threshold, else that plus the side response of one memory (eq. 6). With an empty bank the original
    module runs alone and the output is bit-identical to its. A bank has the size of what it holds, unless `reserve`
    made room for more.

    Args:
        base_layer: the `nn.Linear`, `Conv1D` or quantized linear map to wrap; it is kept as is. Where its weight is
            quantized, offloaded or cut over ranks, its own forward gives the main output (`wise_fast.place`).
        routing: context that knows prompts and caches; a fresh one treats every token as prompt.
        reduction: of token scores, "mean" or "max".
        dtype: of the activations, and so of the side memory; None takes what the layer says it computes in.
        exact_main: whether the main memory's output always comes from the layer's own product, so that sequences out
            of scope repeat the unedited model to the bit. Otherwise up to 16 decoded tokens on a device are one launch
            that reads the weight and the chosen memory together (`wise_kernels.gated_linear`; neuron layout, a weight
            in floating point, no gradient), and the output differs in the last bits. May be set at any time: what is
            compiled compiles again, and a captured graph stays as it is.

    Attributes:
        reserved: whether the buffers are room (`reserve`), in which banks are changed in place.
        size: of the bank being served (`wise_fast.capacity.Size`), however large its room.
        named: whether packs can be asked for by name.

    Raises:
        UnsupportedModelError: `base_layer` is no such map, or not loaded.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        routing: Routing | None = None,
        reduction: str = "mean",
        dtype: torch.dtype | None = None,
        exact_main: bool = True,
    ):
        super().__init__()
        if not is_linear(base_layer) and not place.is_quantized(base_layer):
            raise UnsupportedModelError(
                f"a {type(base_layer).__name__} cannot be wrapped; expected nn.Linear or Conv1D in floating point, or "
                "a quantized layer with in_features, out_features and a packed weight"
            )
        self.base_layer = base_layer
        self.routing = Routing() if routing is None else routing
        self.reduction, self.exact_main = reduction, exact_main
        self.in_features, self.out_features = linear_shape(base_layer)
        for name in _BUFFERS:
            self.register_buffer(name, None)
        self.register_buffer("popcounts", None, persistent=False)
        self.register_buffer("limits", None, persistent=False)
        kind = dict(dtype=place.dtype_of(base_layer) if dtype is None else dtype, device=place.device_of(base_layer))
        self.register_buffer("_place", torch.empty(0, **kind), persistent=False)  # moves and is cast as the model is
        self.reserved = False
        self.named = True  # no bank without packs is served
        self.size = capacity.NOTHING  # of what the bank holds

    @property
    def weight(self) -> Tensor:
        """The main memory's weight, as the original module stores it."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The main memory's bias [d_out], if it has one."""
        return self.base_layer.bias

    @property
    def plain(self) -> bool:
        """Whether the main memory's weight is at hand as floating point numbers."""
        return place.is_plain(self.base_layer)

    @property
    def device(self) -> torch.device:
        """Where activations come in and side memories are; an offloaded weight is elsewhere."""
        return self._place.device

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and side memories; a quantized weight's is another."""
        return self._place.dtype

    @property
    def layout(self) -> str:
        """Mask layout of the bank: element bits are [J, d_out, words], neuron columns [K]."""
        return "element" if self.index is not None and self.index.ndim == 3 else "neuron"

    @property
    def memories(self) -> int:
        """Number of side memories being served."""
        return self.size.memories

    @torch.inference_mode(False)
    def set_bank(self, bank: Bank | None) -> None:
        """Serve this `bank` (`wise_fast.memory.Bank`) from now on; None serves the main memory alone.

        Where room was reserved the bank is copied into it, and graphs compiled or captured before serve it. One that
        does not fit gets new buffers, with each size doubled until it does.
        """
        before = self._room, self.popcounts
        try:
            self._take(bank)
            self._count()
        except BaseException:  # the device is full, say; what is half copied into reserved room is lost
            self._hold(before[0])
            self.popcounts = before[1]
            raise
        self.size = capacity.NOTHING if bank is None else capacity.size_of(bank)
        self.named = bank is None or bank.limits is not None

    def _take(self, bank: Bank | None) -> None:
        """Make the buffers hold a bank: in their room if some was reserved."""
        room = self._room
        if not self.reserved:
            self._hold(bank)
            return
        if bank is not None and not capacity.fits(room, bank):
            self._hold(capacity.grown(room, bank, like=bank.values.new_empty(0, device=room.values.device)))
            logger.info("a bank of %d memories outgrew what was reserved", bank.thresholds.shape[0])
        capacity.put(self._room, bank)

    @torch.inference_mode(False)
    def reserve(
        self, memories: int, rows: int, rank: int | None = None, layout: str = "neuron", edits: int = 0
    ) -> None:
        """Make room, so that banks up to this size are served without a change of any buffer's shape or address.

        Memories that are served go on being served; a free slot costs next to nothing. What is saved (`state_dict`)
        has the size of what is held.

        Args:
            memories: how many.
            rows: values of all of them together: their columns (neuron layout) or single weights (element).
            rank: columns of the leverage factors; None where scores are not over the root of their leverage.
            layout: of the bank to come.
            edits: in all memories together, of which each has a subject (`wise_fast.subjects`).

        Raises:
            ConfigError: a size is not positive, there is no such layout, it has no leverage, or the bank being served
                does not fit.
        """
        capacity.require_sizes(memories=memories, rows=rows, rank=1 if rank is None else rank)
        if layout not in ("neuron", "element"):
            raise ConfigError(f"layout is {layout!r}, expected 'neuron' or 'element'")
        if layout == "element" and rank is not None:
            raise ConfigError(f"rank is {rank}, but memories in the element layout have no leverage; leave it None")
        size = capacity.Size(memories, rows, rank or 0, edits * SPELLINGS, edits)
        shape = self.out_features, self.in_features
        room, held = capacity.blank(layout, shape, size, rank is not None, self._place), self.held
        if held is not None and not capacity.fits(room, held):
            given = "{} memories of {} values, factors of {} columns".format
            raise ConfigError(
                f"reserved are {given(*size[:3])} in the {layout} layout, but what is served takes "
                f"{given(*capacity.size_of(held)[:3])} in the {self.layout} layout; reserve more"
            )
        capacity.put(room, held)
        self._hold(room)
        self.reserved = True
        self._count()

    @property
    def _room(self) -> Bank | None:
        """The buffers as a bank."""
        return None if self.bounds is None else Bank(*(getattr(self, name) for name in _ALL))

    @property
    def held(self) -> Bank | None:
        """The bank being served, a copy without the room that is free; None when there is none."""
        return capacity.taken(self._room, self.size) if self.memories else None

    def _hold(self, bank: Bank | None) -> None:
        held = {name: None if bank is None else getattr(bank, name) for name in _ALL}
        held = {name: None if value is None else value.to(self.device) for name, value in held.items()}
        for name, value in held.items():
            setattr(self, name, value)

    def activate(self, rows: Sequence[int]) -> None:
        """Let sequences that ask for nothing have all that these rows of `limits` open; in place."""
        self._require_packs()
        if self.limits is not None:
            self.thresholds.copy_(self.limits[list(rows)].amin(0))

    def _require_packs(self) -> None:
        if not self.named:
            raise PackError(
                "the bank was set by hand and has no packs; set the editor's state, and it serves them again"
            )

    def _count(self) -> None:
        """Where the values of every block of bits begin, once a bank instead of in every call (element layout)."""
        made = kernels.popcount_table(self.index) if self.layout == "element" else None
        if made is not None and self.popcounts is not None and self.popcounts.shape == made.shape:
            self.popcounts.copy_(made)
        else:
            self.popcounts = made

    def forward(self, a: Tensor) -> Tensor:
        if self.bounds is None or not self.routing.enabled:
            return self.base_layer(a)
        flat = a.reshape(-1, a.shape[-1])
        seen, held = place.whole(flat, self.in_features, self.base_layer), self.routing.held
        bank = self.values, self.index, self.bounds
        if held is not None and not self.exact_main and self.plain and self.layout == "neuron":
            main = linear_weight(self.base_layer), self.bias
            y = kernels.gated_linear(seen, *main, *bank, held.to(a.device), exact_main=False)
            return y.view(*a.shape[:-1], self.out_features)
        if held is None:
            y, side, choice = self._prefill(a, flat, seen)
        else:
            y, side, choice = self._main(flat), None, held.to(a.device)
        if self.layout == "neuron":
            kernels.gated_add_(y, seen, *bank, choice, side)
        else:
            kernels.gated_add_element_(y, seen, *bank, choice, side, self.popcounts)
        return y.view(*a.shape[:-1], self.out_features)

    def _main(self, flat: Tensor) -> Tensor:
        """The main memory's output by its own forward; [N, d_out], to be changed in place."""
        y = self.base_layer(flat)
        # What a layer of a kind of its own returns with a gradient may be a view, which must not be changed.
        return y if self.plain or not y.requires_grad else y.clone()

    def _prefill(self, a: Tensor, flat: Tensor, seen: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Main output, response if it is kept, and the decision, for activations `a`: `flat` [N, features], of all
        ranks `seen` [N, d_ff]."""
        kept = kernels.keeps_response(self.bounds.shape[0] - 1, flat.shape[0], self.out_features, self.values.device)
        bank = self.values, self.index, self.bounds, kept
        more = () if self.layout == "neuron" else (self.popcounts,)
        if self.plain:
            dual = kernels.dual_forward if self.layout == "neuron" else kernels.dual_forward_element
            y, side, norms = dual(seen, linear_weight(self.base_layer), self.bias, *bank, *more)
        else:
            respond = kernels.side_forward if self.layout == "neuron" else kernels.side_forward_element
            y, (side, norms) = self._main(flat), respond(seen, *bank, *more)
        leverage = None
        if self.factors is not None:
            leverage = kernels.leverage(seen, self.index, self.bounds, self.factors)
            if self.leveraged is not None:  # over the root of 1 a score is as it was, to the bit
                leverage = torch.where(self.leveraged[:, None], leverage, 1.0)
        mask = self.routing.mask
        if mask is None:
            batch = a.shape[0] if a.ndim > 2 else 1
            mask = torch.ones(batch, flat.shape[0] // max(batch, 1), dtype=torch.bool, device=a.device)
        mask = mask.to(a.device)
        thresholds = self._thresholds()
        if self.names is not None and self.routing.ids is not None:
            about = (getattr(self, name) for name in _NAMED)
            thresholds = named(thresholds, self.routing.ids, mask, seen.detach(), *about)
        if leverage is not None and self.last_limits is not None:
            thresholds = narrowed(thresholds, self.last_limits, norms.detach(), leverage.detach(), mask)
        scores, choice = kernels.route(norms, mask, thresholds, leverage, self.reduction)
        self.routing.scores, self.routing.thresholds, self.routing.choice = scores.detach(), thresholds, choice
        return y, side if kept else None, choice

    def _thresholds(self) -> Tensor:
        """[J], or [B, J] where sequences ask for memories of their own."""
        rows = self.routing.rows
        if rows is None:
            return self.thresholds
        self._require_packs()
        return self.limits.index_select(0, rows.to(self.limits.device))

    def _apply(self, fn, recurse: bool = True):
        exact = {name: getattr(self, name) for name in _EXACT}
        super()._apply(fn, recurse)
        for name, value in exact.items():  # a dtype cast must not round it
            if value is not None and not value.is_meta:
                setattr(self, name, value.to(getattr(self, name).device))
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        held = self.held
        for name in _BUFFERS if self.reserved else ():
            value = None if held is None else getattr(held, name)
            destination.pop(prefix + name, None)
            if value is not None:
                destination[prefix + name] = value

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if not any(key.startswith(prefix) for key in state_dict):
            return super()._load_from_state_dict(state_dict, prefix, *args)
        room = self._room
        for name in _BUFFERS:  # a bank's size is part of its state
            value = state_dict.get(prefix + name)
            setattr(self, name, None if value is None else torch.empty_like(value, device=self.device))
        self.limits = None
        super()._load_from_state_dict(state_dict, prefix, *args)
        bank = self._room
        if self.reserved:
            self._hold(room)
        self.set_bank(bank)

    def extra_repr(self) -> str:
        return f"d_ff={self.in_features}, d_out={self.out_features}, memories={self.memories}, layout={self.layout}"
