"""Tail replay: run what lies before the edited projection once, and what lies after it at every step.

`Tail.capture` runs the model's own forward until the projection is reached, keeps what each frozen module before it
returned, as far as anything behind it reads that, and stops there. `Tail.replay` runs the same forward again, but every
such module answers from the tape, the projection returns the tensor it is given, and the last layer's FFN and the LM
head see label positions only. No FFN but the edited layer's sees padding. The model's own code does the rest (masks,
residuals, later layers, final norm, soft-capping), so no architecture needs a tail of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from wise_fast import place
from wise_fast.architectures import Architecture, evaluating
from wise_fast.axes import SHAPES, Axis, axes_of, differentiable, kept, read_of
from wise_fast.capture import Axes, Capture
from wise_fast.gradients import with_rows

_TOKENS = 16  # of the vocabulary, that are asked for what a replay reads


class _Reached(Exception):
    """Raised inside the model to leave its forward at the projection."""


class Tail:
    """Capture and replay for one model and one edited projection.

    Attributes:
        fewest: of `require_gradients`, rows that layers behind the projection are given at least, by name.
    """

    def __init__(self, model: nn.Module, architecture: Architecture):
        self.model = model
        self.architecture = architecture
        self.fewest: dict[str, int] = {}
        self._evaluates = False

    def give_rows(self, fewest: dict[str, int]) -> None:
        """Tell how many rows layers need for a gradient (`require_gradients`). What a replay reads is told by one."""
        if fewest != self.fewest:
            self.fewest = fewest
            self.__dict__.pop("axes", None)

    @property
    def at_last_layer(self) -> bool:
        """Whether no attention follows the projection."""
        return self.architecture.layer == len(self.architecture.layers) - 1

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Run with the model in eval mode; inside another such block nothing is left to do.

        To walk through all modules takes as long as a layer's forward does.
        """
        if self._evaluates:
            yield
            return
        self._evaluates = True
        try:
            with evaluating(self.model):
                yield
        finally:
            self._evaluates = False

    @torch.no_grad()
    def capture(self, input_ids: Tensor, attention_mask: Tensor) -> Capture:
        """Run the frozen part once. Both arguments are [B, T]; rows are padded on the right."""
        return self._capture(input_ids, attention_mask, self.axes)

    def _capture(self, input_ids: Tensor, attention_mask: Tensor, axes: Axes) -> Capture:
        """By these axes; of modules that they do not name all is kept."""
        a, tape = self._record(input_ids, attention_mask, axes)
        base = getattr(self._projection(), "base_layer", self._projection())
        flat = a.reshape(-1, a.shape[-1])
        whole = place.whole(flat, self.architecture.d_ff, base)
        return Capture(input_ids, attention_mask, whole, base(flat), tape, axes, tuple(a.shape[:-1]))

    @functools.cached_property
    def axes(self) -> Axes:
        """Where the sequences and their tokens are in every taped tensor, and whether a replay reads it."""
        embeddings = self.model.get_input_embeddings()
        with torch.inference_mode(False), torch.no_grad():
            ids = [torch.arange(a * b, device=place.device_of(embeddings)).view(a, b) % _TOKENS for a, b in SHAPES]
            one, two = (self._capture(batch, torch.ones_like(batch), {}) for batch in ids)
            calls = {name: zip(made, two.tape[name], strict=True) for name, made in one.tape.items()}
            axes = {name: [axes_of(*pair) for pair in pairs] for name, pairs in calls.items()}
            padded = self._capture(ids[1], torch.ones_like(ids[1]).tril(1), {})
            return self._read_axes(*(replace(capture, axes=axes) for capture in (one, padded)))

    def _read_axes(self, *captures: Capture) -> Axes:
        """The captures' axes, with what a replay reads: what has a gradient, if without the rest all of them replay as
        before. Where that cannot be told, everything."""
        every = captures[0].axes
        tape = {name: [differentiable(call) for call in calls] for name, calls in captures[0].tape.items()}
        leaves = [value for value in tree_leaves(tape) if isinstance(value, Tensor) and value.requires_grad]
        try:
            with torch.enable_grad():
                states = self._states_of(replace(captures[0], tape=tape))
                gradients = torch.autograd.grad(states.sum(), leaves, allow_unused=True)
            read = {id(leaf) for leaf, gradient in zip(leaves, gradients, strict=True) if gradient is not None}
            axes = {n: [read_of(*of, read) for of in zip(tape[n], calls, strict=True)] for n, calls in every.items()}
            same = all(self._same(capture, axes) for capture in captures)
        except Exception:  # of any model's code: no gradient is to be had, or it writes into what it is given
            same = False
        return axes if same else every

    def _same(self, capture: Capture, axes: Axes) -> bool:
        """Whether a tape that keeps what these axes say is read replays as the capture's own."""
        tape = {n: [kept(*of) for of in zip(calls, axes[n], strict=True)] for n, calls in capture.tape.items()}
        return torch.equal(self._states_of(replace(capture, tape=tape)), self._states_of(capture))

    def _states_of(self, capture: Capture) -> Tensor:
        """What the LM head is given at every token of the capture."""
        return self._states(capture, capture.main, torch.arange(len(capture.main), device=capture.main.device))

    def _record(self, input_ids: Tensor, attention_mask: Tensor, axes: Axes) -> tuple[Tensor, dict[str, list]]:
        """The projection's input and the tape."""
        tape: dict[str, list] = {}
        found: list[Tensor] = []
        with ExitStack() as stack:
            stack.enter_context(self.evaluating())
            self._skip_padding(stack, self.architecture.ffns[: self.architecture.layer], attention_mask)
            for name, module in self._upstream():
                tape[name] = []
                stack.enter_context(_forward(module, _recorder(module.forward, tape[name], axes.get(name))))
            stack.enter_context(_forward(self._projection(), _stop_at(found)))
            stack.enter_context(suppress(_Reached))
            self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return found[0], {name: calls for name, calls in tape.items() if calls}

    @property
    def head_is_plain(self) -> bool:
        """Whether the LM head's weight can be read, so that `head_of` can take a part of it."""
        return place.is_plain(self.model.get_submodule(self.architecture.head))

    def head_of(self, vocabulary: Tensor) -> tuple[Tensor, Tensor | None]:
        """The LM head's weight and bias for these tokens [V], for `replay`."""
        head = self.model.get_submodule(self.architecture.head)
        return head.weight.detach()[vocabulary], None if head.bias is None else head.bias.detach()[vocabulary]

    def replay(self, capture: Capture, y: Tensor, positions: Tensor, head: tuple | None = None) -> Tensor:
        """Logits at label positions, given the projection's output.

        Args:
            capture: of the same rows.
            y: [B*T, d_out], differentiable; the projection's output in the model's dtype.
            positions: [M] int64 into the flattened [B*T] tokens.
            head: of `head_of`, for the logits of some tokens alone; None for the whole vocabulary.

        Returns:
            [M, V] logits, exactly those of a full forward whose projection returned `y`.
        """
        return self.replay_all([(capture, y, positions)], head)

    def replay_all(self, parts: Sequence[tuple[Capture, Tensor, Tensor]], head: tuple | None = None) -> Tensor:
        """Logits of several captures' label positions, one behind the other, from one product with the LM head.

        A large head costs its reading, however few the positions are.
        """
        module, states = self.model.get_submodule(self.architecture.head), [self._states(*part) for part in parts[:-1]]
        with self._replaying(*parts[-1]) as stack:
            forward = module.forward if head is None else lambda h: nn.functional.linear(h, *head)
            stack.enter_context(_forward(module, lambda h: forward(torch.cat([*states, h], 1))))
            return self._run(parts[-1][0]).logits[0]

    def _states(self, capture: Capture, y: Tensor, positions: Tensor) -> Tensor:
        """[1, M, d], what the LM head is given."""
        found: list[Tensor] = []
        with self._replaying(capture, y, positions) as stack:
            stack.enter_context(_forward(self.model.get_submodule(self.architecture.head), _stop_at(found)))
            stack.enter_context(suppress(_Reached))
            self._run(capture)
        return found[0]

    @contextmanager
    def _replaying(self, capture: Capture, y: Tensor, positions: Tensor) -> Iterator[ExitStack]:
        """Let the frozen modules answer from the tape and the projection return `y` [B*T, d_out]; the last FFN and the
        head see label positions alone."""
        y = y.view(*capture.shape, y.shape[-1])
        with ExitStack() as stack:
            stack.enter_context(self.evaluating())
            for name, calls in capture.tape.items():
                module = self.model.get_submodule(name)
                stack.enter_context(_forward(module, _player(calls, module.forward)))
            stack.enter_context(_forward(self._projection(), lambda _a: y))
            for name, rows in self.fewest.items():
                module = self.model.get_submodule(name)
                stack.enter_context(_forward(module, with_rows(rows, module.forward)))
            stack.enter_context(self.head_at(positions))
            *later, last = self.architecture.ffns[self.architecture.layer :]
            self._skip_padding(stack, later, capture.attention_mask)
            self._limit(stack, [last], positions)
            yield stack

    def _skip_padding(self, stack: ExitStack, ffns: Sequence[str | None], attention_mask: Tensor) -> None:
        """Let these FFNs compute what is not padding, which no token sees."""
        seen = attention_mask.flatten().nonzero()[:, 0]
        if len(seen) < attention_mask.numel():
            self._limit(stack, ffns, seen)

    def _limit(self, stack: ExitStack, ffns: Sequence[str | None], positions: Tensor) -> None:
        """Let these FFNs compute some of the flattened tokens alone; a layer that has no such module is left out."""
        for name in filter(None, ffns):
            ffn = self.model.get_submodule(name)
            stack.enter_context(_forward(ffn, _at(positions, ffn.forward)))

    def _run(self, capture: Capture):
        """The model's own forward."""
        return self.model(
            input_ids=capture.input_ids, attention_mask=capture.attention_mask, use_cache=False, return_dict=True
        )

    @contextmanager
    def head_at(self, positions: Tensor) -> Iterator[None]:
        """Let the LM head see only these of the flattened [B*T] tokens: logits become [1, M, vocabulary]."""
        head = self.model.get_submodule(self.architecture.head)
        handle = head.register_forward_pre_hook(
            lambda _m, args: (args[0].reshape(-1, args[0].shape[-1])[positions.to(args[0].device)][None], *args[1:])
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
        seen: set[nn.Module] = set()
        for depth in range(len(path)):
            ancestor = ".".join(path[:depth])
            for child, module in self.model.get_submodule(ancestor).named_children():
                if child != path[depth] and module not in seen:
                    seen.add(module)
                    yield f"{ancestor}.{child}".lstrip("."), module


def _recorder(forward: Callable, calls: list, axes: list[list[Axis]] | None) -> Callable:
    """Adds to `calls` what a tape keeps of each call."""

    def record(*args, **kwargs):
        output = forward(*args, **kwargs)
        calls.append(output if axes is None else kept(output, axes[len(calls)]))
        return output

    return record


def _player(calls: list, forward: Callable) -> Callable:
    answers = iter(calls)

    def play(*args, **kwargs):
        for answer in answers:
            return answer
        return forward(*args, **kwargs)  # the tail asks once more

    return play


def _at(positions: Tensor, forward: Callable) -> Callable:
    """A token-wise module that computes these of the flattened tokens; the others, which nothing reads, are zero."""

    def sparse(x: Tensor) -> Tensor:
        flat, places = x.reshape(-1, x.shape[-1]), positions.to(x.device)
        some = forward(flat[None, places])[0]
        return torch.zeros_like(flat).index_copy(0, places, some).view(x.shape)

    return sparse


def _stop_at(found: list[Tensor]) -> Callable:
    def stop(a: Tensor):
        found.append(a)
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
