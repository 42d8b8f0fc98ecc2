"""What one forward up to the edited projection leaves for replays of what lies behind it (`wise_fast.tail`)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor
from torch.utils._pytree import tree_leaves

from wise_fast.axes import Axis, pick

Axes = dict[str, list[list[Axis]]]


@dataclass(frozen=True)
class Capture:
    """What one batch needs for replay.

    Attributes:
        input_ids, attention_mask: [B, T], right-padded.
        a: [B*T, d_ff], the projection's input.
        main: [B*T, d_out], the frozen projection's output.
        tape: per module name, the outputs of its calls in order; NaN where no replay reads them.
        axes: per module name, call and tensor therein, where its sequences are (see `Tail.axes`).
        shape: shape in which the model hands activations to the projection, less its last dimension.
    """

    input_ids: Tensor
    attention_mask: Tensor
    a: Tensor
    main: Tensor
    tape: dict[str, list]
    axes: Axes
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of its activations."""
        taped = [value for value in tree_leaves(self.tape) if isinstance(value, Tensor)]
        storages = [tensor.untyped_storage() for tensor in (self.a, self.main, *taped)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def rows(self, index: Tensor, width: int | None = None) -> Capture:
        """The same for a subset of the batch's sequences, less the padding they share.

        Args:
            index: [b] int64.
            width: how many of their tokens are kept, from the left; all when None.
        """
        batch, length = self.input_ids.shape
        width = length if width is None else width
        tape = {
            name: [pick(*call, index, length, width) for call in zip(calls, self.axes[name], strict=True)]
            for name, calls in self.tape.items()
        }
        return replace(
            self,
            input_ids=self.input_ids[index, :width],
            attention_mask=self.attention_mask[index, :width],
            a=self.a.view(batch, length, -1)[index, :width].flatten(0, 1),
            main=self.main.view(batch, length, -1)[index, :width].flatten(0, 1),
            tape=tape,
            shape=(len(index), width) if len(self.shape) == 2 else (len(index) * width,),
        )
