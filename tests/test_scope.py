"""Scope by the last prompt token: thresholds of each sequence, in every way they can be open or closed."""

import pytest
import torch

from tests.edited import ELSEWHERE, FACTS, make_editor
from wise_fast import WiseConfig
from wise_fast.scope import narrowed, newness
from wise_fast.storage import load

INF = float("inf")


def case(last, norms=None, batch=1, length=3):
    """Leverage and norms [J, B*T] with these values at the last token of each sequence, [B, J]; others are large."""
    leverage = torch.full((len(last[0]), batch, length), 50.0)
    leverage[:, :, -1] = torch.tensor(last).t()
    norm = torch.ones_like(leverage) if norms is None else torch.full_like(leverage, norms)
    return norm.flatten(1), leverage.flatten(1), torch.ones(batch, length, dtype=torch.bool)


def test_newness_is_the_root_of_leverage_over_norm():
    torch.testing.assert_close(newness(torch.tensor([4.0, 0.0]), torch.tensor([1.0, 2.0])), torch.tensor([2.0, 0.0]))
    assert newness(torch.tensor(1.0), torch.tensor(0.0)) > 100


def test_too_new_a_token_has_to_be_louder_by_as_much():
    found = narrowed(torch.tensor([0.5]), torch.tensor([1.0]), *case([[4.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.5 * 2]]))
    found = narrowed(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 4.0]), *case([[4.0, 4.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.5 * 2 * 4, 0.5]]))


def test_the_memory_that_knows_it_best_keeps_its_threshold_and_others_have_to_be_louder():
    found = narrowed(torch.tensor([0.5, 0.5]), torch.tensor([2.0, 2.0]), *case([[1.0, 2.25], [2.25, 1.0]], batch=2))
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.75], [0.75, 0.5]]))


def test_loud_responses_make_a_token_less_new():
    limits = torch.tensor([1.0])
    assert narrowed(torch.tensor([0.5]), limits, *case([[2.0]])) > 0.7
    assert narrowed(torch.tensor([0.5]), limits, *case([[2.0]], norms=3.0)) == 0.5


def test_the_last_token_is_the_last_of_the_prompt_and_padding_may_hold_anything():
    norms, leverage, mask = case([[1.0]], length=4)
    leverage = leverage.clone()
    leverage[0, 1], leverage[0, 2:] = 1.0, torch.nan
    for given in ([True, True, False, False], [False, True, False, False]):
        assert narrowed(torch.tensor([0.5]), torch.tensor([2.0]), norms, leverage, torch.tensor([given])) == 0.5


def test_memories_without_a_limit_and_closed_ones_stay_as_they_are():
    thresholds = torch.tensor([[0.5, INF, 0.25], [INF, 0.5, 0.25]])
    found = narrowed(thresholds, torch.tensor([4.0, 4.0, INF]), *case([[4.0, 1e-9, 9.0], [1e-9, 4.0, 9.0]], batch=2))
    torch.testing.assert_close(found, thresholds)  # a closed memory that knows more makes no open one louder


@pytest.mark.parametrize("batch, length, memories", [(0, 3, 2), (2, 0, 2), (2, 3, 0)])
def test_nothing_to_route(batch, length, memories):
    thresholds, tokens = torch.full((memories,), 0.5), torch.ones(memories, batch * length)
    mask = torch.ones(batch, length, dtype=torch.bool)
    found = narrowed(thresholds, torch.ones(memories), tokens, tokens, mask)
    assert found.shape in ((memories,), (batch, memories)) and (found == 0.5).all()


def test_an_empty_prompt_is_no_error():
    norms, leverage, _ = case([[1.0]])
    mask = torch.zeros(1, 3, dtype=torch.bool)
    assert narrowed(torch.tensor([0.5]), torch.tensor([2.0]), norms, leverage, mask).shape == (1, 1)


def test_limits_come_from_the_edits_and_are_kept(tmp_path):
    editor = make_editor(FACTS, shard_size=2)
    for memory in editor.memories:
        new = [memory.newness(memory.select(editor._prompt_activations(FACTS[i].prompt))) for i in memory.edits]
        assert memory.last_limit == pytest.approx(WiseConfig().last_ratio * sum(new) / 2, rel=1e-4)
    editor.save_pretrained(tmp_path / "pack")
    loaded = load(tmp_path / "pack").state.memories
    assert [m.last_limit for m in loaded] == [m.last_limit for m in editor.memories]
    assert make_editor(FACTS, last_ratio=None).memories[0].last_limit == INF


@pytest.mark.parametrize("ratio", [0.2, 1.0, None])
def test_edits_that_hold_are_heard_however_new_they_are_and_others_are_not(ratio):
    editor = make_editor(FACTS, last_ratio=ratio)
    assert all(report.success for report in editor.edits)
    for text, inside in (*((fact.prompt, True) for fact in FACTS), *((text, False) for text in ELSEWHERE)):
        editor.model(**editor.tokenizer(text, return_tensors="pt"))
        assert (int(editor.routing.choice) == 0) == inside
        if ratio == 0.2 and inside:  # a limit that all are beyond
            assert float(editor.routing.thresholds) > editor.memories[0].z_threshold
