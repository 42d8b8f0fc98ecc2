"""How loud the unrelated texts of a batch are, and which of them a step looks at."""

import pytest
import torch

from wise_fast import WiseConfig
from wise_fast.memory import SideMemory
from wise_fast.quiet import Quiet
from wise_fast.texts import Texts

UNIT = 2.0
CONFIG = WiseConfig()
MARGIN = CONFIG.alpha * UNIT


def make_quiet(norms, p=None, reduction="mean"):
    """Texts of two tokens each, whose response has these norms under a memory of ones."""
    count, width = len(norms), 4
    a = torch.tensor(norms)[:, None, None].expand(count, 2, 1) * torch.eye(width)[0]
    memory = SideMemory("neuron", torch.eye(width), torch.arange(width), (width, width))
    names = tuple(str(i) for i in range(count))
    texts = Texts(names, a.reshape(-1, width), torch.arange(count).repeat_interleave(2), torch.ones(count))
    return Quiet(texts, memory, p, CONFIG.replace(reduction=reduction), UNIT), memory


def test_scores_by_hand():
    memory = SideMemory("neuron", torch.zeros(2, 2), torch.arange(2), (2, 2))
    texts = Texts(("a", "b"), torch.zeros(3, 2), torch.tensor([0, 0, 1]), torch.tensor([1.0, 2.0]))
    quiet = Quiet(texts, memory, None, CONFIG, UNIT)
    response = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 8.0]])
    assert quiet.scores(response, torch.arange(3)).tolist() == pytest.approx([3.0, 4.0])
    assert quiet.scores(response[2:], torch.tensor([2])).tolist() == pytest.approx([0.0, 4.0])


def test_between_full_looks_only_what_is_near_its_margin_is_looked_at():
    quiet, _ = make_quiet([0.0] * 5)
    quiet.score[:] = 0.1 * MARGIN
    quiet.score[3] = 0.95 * MARGIN
    shown = [quiet._watched(step).nonzero()[:, 0].tolist() for step in range(1, 11)]
    assert [s == list(range(5)) for s in shown] == [True, True, *[False, False, False, True] * 2]
    assert shown[2] == [3]


def test_what_a_look_at_all_texts_found_serves_the_next_step():
    quiet, memory = make_quiet([0.5 * MARGIN, 2.5 * MARGIN])
    z = torch.zeros_like(memory.values)
    _, fresh = quiet._look(torch.tensor([True, True]), memory, z)
    assert not quiet.hushed(memory, z) and torch.equal(quiet.known, fresh)
    tokens, response = quiet.loud(memory, z, 3)
    assert torch.equal(response, fresh[tokens]) and quiet.known is None


@pytest.mark.parametrize("norms, loud", [([0.2, 1.5, 0.9, 1.1], [1, 3]), ([0.2, 0.9, 0.8], [1])])
def test_what_is_trained_is_above_its_margin_or_the_loudest(norms, loud):
    quiet, memory = make_quiet([n * MARGIN for n in norms])
    tokens, response = quiet.loud(memory, torch.zeros_like(memory.values), 1)
    assert quiet.texts.text[tokens].unique().tolist() == loud and response.requires_grad
    assert quiet.score.tolist() == pytest.approx([n * MARGIN for n in norms])
    expected = [n * MARGIN if i in loud else 0.0 for i, n in enumerate(norms)]
    assert quiet.scores(response, tokens).tolist() == pytest.approx(expected)


def test_settling_and_writing_change_no_response():
    generator = torch.Generator().manual_seed(0)
    half = 0.3 * torch.randn(2, 4, generator=generator)
    p, z = torch.eye(4), torch.randn(4, 4, generator=generator)
    quiet, memory = make_quiet([1.0, 2.0], p)
    _, before = quiet._look(torch.tensor([True, True]), memory, z)
    quiet.settle(half, half @ z)
    _, after = quiet._look(torch.tensor([True, True]), memory, z)
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(quiet.features, quiet.selected @ (p - half.t() @ half))
    quiet.write(memory, z)
    _, written = quiet._look(torch.tensor([True, True]), memory, torch.zeros_like(z))
    torch.testing.assert_close(written, before)
