"""Tail replay: run what lies before the edited projection once, and what lies after it at every step.

`Tail.capture` runs the model's own forward until the projection is reached, keeps what each frozen module before it
returned, and stops there. `Tail.replay` runs the same forward again, but every such module answers from the tape, the
projection returns the tensor it is given, and the LM head sees label positions only. The model's own code does the
rest (masks, residuals, later layers, final norm, soft-capping), so no architecture needs a tail of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from wise_fast.architectures import Architecture, evaluating


class _Reached(Exception):
    """Raised inside the model to leave its forward at the projection."""


@dataclass(frozen=True)
class Capture:
    """What one batch needs for replay.

    Attributes:
        input_ids, attention_mask: [B, T], right-padded.
        a: [B*T, d_ff], the projection's input.
        main: [B*T, d_out], the frozen projection's output.
        tape: per module name, the outputs of its calls in order.
        shape: shape in which the model hands activations to the projection, less its last dimension.
    """

    input_ids: Tensor
    attention_mask: Tensor
    a: Tensor
    main: Tensor
    tape: dict[str, list]
    shape: tuple[int, ...]

    def rows(self, index: Tensor) -> Capture:
        """The same for a subset of the batch's sequences. `index`: [b] int64."""
        batch, length = self.input_ids.shape

        def pick(value):
            if isinstance(value, Tensor):
                if value.ndim and value.shape[0] == batch:
                    return value[index]
                if value.ndim and value.shape[0] == batch * length:
                    return value.view(batch, length, *value.shape[1:])[index].flatten(0, 1)
                return value
            if isinstance(value, (tuple, list)):
                return type(value)(pick(v) for v in value)
            return value

        shape = (len(index), *self.shape[1:]) if len(self.shape) == 2 else (len(index) * length,)
        return replace(
            self,
            input_ids=self.input_ids[index],
            attention_mask=self.attention_mask[index],
            a=self.a.view(batch, length, -1)[index].flatten(0, 1),
            main=self.main.view(batch, length, -1)[index].flatten(0, 1),
            tape={name: [pick(v) for v in calls] for name, calls in self.tape.items()},
            shape=shape,
        )


class Tail:
    """Capture and replay for one model and one edited projection (DESIGN section 3)."""

    def __init__(self, model: nn.Module, architecture: Architecture):
        self.model = model
        self.architecture = architecture

    @torch.no_grad()
    def capture(self, input_ids: Tensor, attention_mask: Tensor) -> Capture:
        """Run the frozen part once. Both arguments are [B, T]; rows are padded on the right."""
        tape: dict[str, list] = {}
        found: list[Tensor] = []
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            for name, module in self._upstream():
                stack.enter_context(_forward(module, self._recorder(name, module.forward, tape)))
            stack.enter_context(_forward(self._projection(), _stop_at(found)))
            try:
                self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
            except _Reached:
                pass
        a = found[0]
        flat = a.reshape(-1, a.shape[-1])
        projection = self._projection()
        main = getattr(projection, "base_layer", projection)(flat)
        return Capture(input_ids, attention_mask, flat, main, tape, tuple(a.shape[:-1]))

    def replay(self, capture: Capture, y: Tensor, positions: Tensor) -> Tensor:
        """Logits at label positions, given the projection's output.

        Args:
            capture: of the same rows.
            y: [B*T, d_out], differentiable; the projection's output in the model's dtype.
            positions: [M] int64 into the flattened [B*T] tokens.

        Returns:
            [M, vocabulary] logits, exactly those of a full forward whose projection returned `y`.
        """
        y = y.view(*capture.shape, y.shape[-1])
        modules = dict(self.model.named_modules())
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            for name, calls in capture.tape.items():
                stack.enter_context(_forward(modules[name], _player(calls)))
            stack.enter_context(_forward(self._projection(), lambda _a: y))
            stack.enter_context(self.head_at(positions))
            output = self.model(
                input_ids=capture.input_ids, attention_mask=capture.attention_mask, use_cache=False, return_dict=True
            )
        return output.logits[0]

    @contextmanager
    def head_at(self, positions: Tensor) -> Iterator[None]:
        """Let the LM head see only these of the flattened [B*T] tokens: logits become [1, M, vocabulary]."""
        head = self.model.get_submodule(self.architecture.head)
        handle = head.register_forward_pre_hook(
            lambda _m, args: (args[0].reshape(-1, args[0].shape[-1])[positions][None], *args[1:])
        )
        try:
            yield
        finally:
            handle.remove()

    def _projection(self) -> nn.Module:
        return self.model.get_submodule(self.architecture.projection)

    def _upstream(self) -> Iterator[tuple[str, nn.Module]]:
        """Largest modules that do not hold the projection: all children of its ancestors, less the ancestors."""
        path = self.architecture.projection.split(".")
        for depth in range(len(path)):
            ancestor = ".".join(path[:depth])
            for child, module in self.model.get_submodule(ancestor).named_children():
                if child != path[depth]:
                    yield f"{ancestor}.{child}".lstrip("."), module

    def _recorder(self, name: str, forward: Callable, tape: dict[str, list]) -> Callable:
        layers = self.architecture.layers
        # Only the last frozen layer's output is read again; the ones before it may answer with their input.
        relay = name in layers and layers.index(name) < self.architecture.layer - 1

        def record(*args, **kwargs):
            output = forward(*args, **kwargs)
            tape.setdefault(name, []).append(_emptied(output) if relay else output)
            return output

        return record


def _emptied(output):
    """The same structure without the hidden states' tokens."""
    return (output[0][:, :0], *output[1:]) if isinstance(output, tuple) else output[:, :0]


def _player(calls: list) -> Callable:
    answers = iter(calls)
    return lambda *_args, **_kwargs: next(answers)


def _stop_at(found: list[Tensor]) -> Callable:
    def stop(a: Tensor):
        found.append(a.detach())
        raise _Reached

    return stop


@contextmanager
def _forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Replace `module.forward` for a while, on the instance only."""
    had = "forward" in module.__dict__
    before = module.forward
    module.forward = forward
    try:
        yield
    finally:
        if had:
            module.forward = before
        else:
            del module.forward
