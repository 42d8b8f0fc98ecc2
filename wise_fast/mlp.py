"""A whole FFN around the projection that has side memories, for models that are put together by hand."""

from __future__ import annotations

from torch import nn

from wise_fast import place
from wise_fast.errors import UnsupportedModelError
from wise_fast.ffn import DualMemoryLinear
from wise_fast.routing import Routing


class DualMemoryFFN(nn.Module):
    """A whole FFN whose value projection has side memories; calls and returns what the FFN did (see `from_mlp`).

    Args:
        mlp: the FFN to wrap, in place: its projection is a `DualMemoryLinear`, `projection`, until `restore`.
        name: dotted name of its value projection.
        routing, reduction: as `DualMemoryLinear` takes them.

    Raises:
        UnsupportedModelError: that projection is none that `DualMemoryLinear` wraps.
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
        linear = [n for n, m in mlp.named_modules() if isinstance(m, place.LINEAR) or place.is_quantized(m)]
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
