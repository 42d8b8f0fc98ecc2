"""The drop-in module: an FFN's value projection with side memories beside it (paper, eq. 3 to 6)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import wise_kernels as kernels
from wise_fast.architectures import is_linear, linear_shape, linear_weight
from wise_fast.errors import PackError, UnsupportedModelError
from wise_fast.memory import Bank
from wise_fast.routing import Routing

_BUFFERS = ("values", "index", "bounds", "thresholds", "factors", "leveraged")  # of a bank, and of a state dict
_EXACT = ("thresholds", "factors", "limits")  # what decides the routing


class DualMemoryLinear(nn.Module):
    """Main memory (the original projection) and a bank of side memories behind one `forward`.

    `forward(a)` takes [..., d_ff] and returns [..., d_out]: per sequence, the main memory's output if every score is
    at most its threshold, else that plus the side response of one memory (eq. 6). With an empty bank the original
    module runs alone and the output is bit-identical to its.

    Args:
        base_layer: the `nn.Linear` or `Conv1D` to wrap; it is kept as is.
        routing: context that knows prompts and caches; a fresh one treats every token as prompt.
        reduction: of token scores, "mean" or "max".

    Raises:
        UnsupportedModelError: `base_layer` is neither, or not in floating point.
    """

    def __init__(self, base_layer: nn.Module, routing: Routing | None = None, reduction: str = "mean"):
        super().__init__()
        if not is_linear(base_layer):
            raise UnsupportedModelError(
                f"a {type(base_layer).__name__} cannot be wrapped; expected nn.Linear or Conv1D in floating point"
            )
        self.base_layer = base_layer
        self.routing = Routing() if routing is None else routing
        self.reduction = reduction
        self.in_features, self.out_features = linear_shape(base_layer)
        for name in _BUFFERS:
            self.register_buffer(name, None)
        self.register_buffer("popcounts", None, persistent=False)
        self.register_buffer("limits", None, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The main memory's weight, as the original module stores it."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The main memory's bias [d_out], if it has one."""
        return self.base_layer.bias

    @property
    def layout(self) -> str:
        """Mask layout of the bank: element bits are [J, d_out, words], neuron columns [K]."""
        return "element" if self.index is not None and self.index.ndim == 3 else "neuron"

    @property
    def memories(self) -> int:
        """Number of side memories being served."""
        return 0 if self.bounds is None else self.bounds.shape[0] - 1

    def set_bank(self, bank: Bank | None) -> None:
        """Serve this `bank` (`wise_fast.memory.Bank`) from now on; None serves the main memory alone."""
        device = self.base_layer.weight.device
        for name in (*_BUFFERS, "limits"):
            value = None if bank is None else getattr(bank, name)
            setattr(self, name, None if value is None else value.to(device))
        self._count()

    def activate(self, rows: Sequence[int]) -> None:
        """Let sequences that ask for nothing have all that these rows of `limits` open; in place."""
        if self.limits is not None:
            self.thresholds.copy_(self.limits[list(rows)].amin(0))

    def _count(self) -> None:
        """Where the values of every block of bits begin, once a bank instead of in every call (element layout)."""
        self.popcounts = kernels.popcount_table(self.index) if self.layout == "element" else None

    def forward(self, a: Tensor) -> Tensor:
        if self.memories == 0 or not self.routing.enabled:
            return self.base_layer(a)
        flat = a.reshape(-1, self.in_features)
        held = self.routing.held
        y, side, choice = self._prefill(a, flat) if held is None else (self.base_layer(flat), None, held.to(a.device))
        bank = self.values, self.index, self.bounds
        if self.layout == "neuron":
            kernels.gated_add_(y, flat, *bank, choice, side)
        else:
            kernels.gated_add_element_(y, flat, *bank, choice, side, self.popcounts)
        return y.view(*a.shape[:-1], self.out_features)

    def _prefill(self, a: Tensor, flat: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        one = self.memories == 1
        given = flat, linear_weight(self.base_layer), self.bias, self.values, self.index, self.bounds, one
        if self.layout == "neuron":
            y, side, norms = kernels.dual_forward(*given)
        else:
            y, side, norms = kernels.dual_forward_element(*given, self.popcounts)
        leverage = None
        if self.factors is not None:
            leverage = kernels.leverage(flat, self.index, self.bounds, self.factors)
            if self.leveraged is not None:  # over the root of 1 a score is as it was, to the bit
                leverage = torch.where(self.leveraged[:, None], leverage, 1.0)
        mask = self.routing.mask
        if mask is None:
            batch = a.shape[0] if a.ndim > 2 else 1
            mask = torch.ones(batch, flat.shape[0] // max(batch, 1), dtype=torch.bool, device=a.device)
        mask = mask.to(a.device)
        scores, choice = kernels.route(norms, mask, self._thresholds(), leverage, self.reduction)
        self.routing.scores, self.routing.choice = scores.detach(), choice
        return y, side if one else None, choice

    def _thresholds(self) -> Tensor:
        """[J], or [B, J] where sequences ask for memories of their own."""
        rows = self.routing.rows
        if rows is None:
            return self.thresholds
        if self.limits is None:
            raise PackError(
                "the bank was set by hand and has no packs; set the editor's state, and it serves them again"
            )
        return self.limits.index_select(0, rows.to(self.limits.device))

    def _apply(self, fn, recurse: bool = True):
        exact = {name: getattr(self, name) for name in _EXACT}
        super()._apply(fn, recurse)
        for name, value in exact.items():  # a dtype cast must not round it
            if value is not None and not value.is_meta:
                setattr(self, name, value.to(getattr(self, name).device))
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args):
        replaced = any(key.startswith(prefix) for key in state_dict)
        if replaced:  # a bank's size is part of its state
            for name in _BUFFERS:
                value = state_dict.get(prefix + name)
                device = self.base_layer.weight.device
                setattr(self, name, None if value is None else torch.empty_like(value, device=device))
            self.limits = None
        super()._load_from_state_dict(state_dict, prefix, *args)
        if replaced:
            self._count()

    def extra_repr(self) -> str:
        return f"d_ff={self.in_features}, d_out={self.out_features}, memories={self.memories}, layout={self.layout}"


class DualMemoryFFN(nn.Module):
    """A whole FFN whose value projection has side memories; calls and returns what the FFN did (see `from_mlp`).

    Args:
        mlp: the FFN to wrap, in place: its projection is a `DualMemoryLinear`, `projection`, until `restore`.
        name: dotted name of its value projection.
        routing, reduction: as `DualMemoryLinear` takes them.

    Raises:
        UnsupportedModelError: that projection is no linear map in floating point.
    """

    def __init__(self, mlp: nn.Module, name: str, routing: Routing | None = None, reduction: str = "mean"):
        super().__init__()
        self.mlp = mlp
        self._name = name
        parent, _, attribute = name.rpartition(".")
        setattr(mlp.get_submodule(parent), attribute, DualMemoryLinear(mlp.get_submodule(name), routing, reduction))

    @classmethod
    def from_mlp(
        cls, mlp: nn.Module, projection: str | None = None, routing: Routing | None = None, reduction: str = "mean"
    ) -> DualMemoryFFN:
        """Wrap an FFN in place.

        Args:
            mlp: the FFN, such as `model.model.layers[5].mlp`.
            projection: dotted name of its value projection; None takes its last linear map.
            routing, reduction: as `DualMemoryLinear` takes them.

        Raises:
            UnsupportedModelError: there is no such linear map.
        """
        linear = [n for n, m in mlp.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
        name = projection or (linear[-1] if linear else None)
        if name not in linear:
            raise UnsupportedModelError(
                f"{type(mlp).__name__} has no linear map {name!r} to wrap; it has: {', '.join(linear) or 'none'}"
            )
        return cls(mlp, name, routing, reduction)

    @property
    def projection(self) -> DualMemoryLinear:
        """The wrapped value projection, until `restore`."""
        return self.mlp.get_submodule(self._name)

    def restore(self) -> nn.Module:
        """Put the original projection object back and return the original FFN."""
        parent, _, attribute = self._name.rpartition(".")
        setattr(self.mlp.get_submodule(parent), attribute, self.projection.base_layer)
        return self.mlp

    def forward(self, *args, **kwargs):
        return self.mlp(*args, **kwargs)
