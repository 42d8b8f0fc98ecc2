"""Replays of a tail beside the whole model: what tests of `wise_fast.tail` and of its tapes share."""

import torch
from torch import nn

from tests.tiny import tiny_model
from wise_fast.architectures import find_architecture
from wise_fast.tail import Tail

TOLERANCE = dict(rtol=1e-5, atol=1e-5)  # fp32 round-off of logits of size 1 to 10
LENGTHS = (5, 2, 7, 3)


def make_tail(family, layer=None, **overrides):
    model = tiny_model(family, **overrides)
    return Tail(model, find_architecture(model, layer))


def right_padded(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return torch.randint(0, 256, mask.shape, generator=generator) * mask, mask


def targets(mask):
    """Every real token predicts a label of its own."""
    positions = mask.flatten().nonzero()[:, 0]
    return positions, (positions * 37 + 11) % 256


def whole(tail, ids, mask, shift):
    """Logits [N, V], loss and d loss / d y by an ordinary forward whose projection's output is shifted."""
    positions, labels = targets(mask)
    kept = []

    def hook(_module, _args, output):
        kept.append((output.detach() + shift.view_as(output)).requires_grad_())
        return kept[0]

    handle = tail.model.get_submodule(tail.architecture.projection).register_forward_hook(hook)
    logits = tail.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.flatten(0, 1)[positions]
    handle.remove()
    loss = nn.functional.cross_entropy(logits.float(), labels)
    loss.backward()
    return logits.detach(), loss.detach(), kept[0].grad.reshape(ids.numel(), -1)


def replayed(tail, capture, shift):
    positions, labels = targets(capture.attention_mask)
    y = (capture.main + shift).requires_grad_()
    logits = tail.replay(capture, y, positions)
    loss = nn.functional.cross_entropy(logits.float(), labels)
    return logits.detach(), loss.detach(), torch.autograd.grad(loss, y)[0]


def compare(tail, capture, tolerance=TOLERANCE, dtype=torch.float32):
    shift = 0.5 * torch.randn(capture.main.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = whole(tail, capture.input_ids, capture.attention_mask, shift)
    for got, want in zip(replayed(tail, capture, shift), expected, strict=True):
        torch.testing.assert_close(got, want, **tolerance)
