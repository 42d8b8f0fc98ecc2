"""The edit loss against its formulas, and the part of a large vocabulary that steps compute."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wise_fast import WiseConfig, objective
from wise_fast.vocabulary import Likely

CONFIG = WiseConfig(alpha=5.0, beta=20.0, gamma=10.0)


def draw(*size, seed=0, scale=1.0):
    return scale * torch.randn(*size, generator=torch.Generator().manual_seed(seed))


class TestMargins:
    @pytest.mark.parametrize("unit", [1.0, 0.25, 8.0])
    @pytest.mark.parametrize("function, score, expected", [("edit", 17.5, 2.5), ("edit", 20, 0), ("edit", 99, 0)])
    def test_edit(self, unit, function, score, expected):
        assert float(objective.edit_margin(torch.tensor(score * unit), CONFIG, unit)) == expected

    @pytest.mark.parametrize("unit", [1.0, 0.25, 8.0])
    @pytest.mark.parametrize("score, expected", [(3.0, 0), (5.0, 0), (7.5, 2.5)])
    def test_irrelevant(self, unit, score, expected):
        assert float(objective.irrelevant_margin(torch.tensor(score * unit), CONFIG, unit)) == expected

    @pytest.mark.parametrize("unit", [1.0, 0.25, 8.0])
    @pytest.mark.parametrize("edit, other, expected", [(20.0, 10.0, 0), (20.0, 12.5, 2.5), (20, 25, 15), (30, 1, 0)])
    def test_gap(self, unit, edit, other, expected):
        pair = torch.tensor(edit * unit), torch.tensor(other * unit)
        assert float(objective.gap_margin(*pair, CONFIG, unit)) == expected


class TestScores:
    def test_by_hand(self):
        response = torch.tensor([[3.0, 4.0], [0.0, 2.0], [9.0, 9.0], [0.0, 1.0], [6.0, 8.0], [5.0, 5.0]])
        mask = torch.tensor([[True, True, False], [True, True, False]])
        assert objective.scores(response, mask, "mean").tolist() == pytest.approx([3.5, 5.5])
        assert objective.scores(response, mask, "max").tolist() == pytest.approx([5.0, 10.0])

    @pytest.mark.parametrize("reduction", ["mean", "max"])
    def test_a_row_without_prompt_scores_nothing(self, reduction):
        mask = torch.tensor([[False, False], [True, True]])
        score = objective.scores(draw(4, 3), mask, reduction)
        assert score[0] == 0 and score[1] > 0

    @pytest.mark.parametrize("reduction", ["mean", "max"])
    def test_gradient_is_finite_at_zero_and_right_elsewhere(self, reduction):
        mask = torch.tensor([[True, True, False]])
        response = torch.zeros(3, 4, requires_grad=True)
        objective.scores(response, mask, reduction).sum().backward()
        assert torch.equal(response.grad, torch.zeros(3, 4))
        response = draw(3, 4).requires_grad_()
        objective.scores(response, mask, reduction).sum().backward()
        unit = (response / response.norm(dim=-1, keepdim=True)).detach()
        if reduction == "mean":
            expected = torch.cat([unit[:2] / 2, torch.zeros(1, 4)])
        else:
            expected = unit * torch.nn.functional.one_hot(response[:2].norm(dim=-1).argmax(), 3)[:, None]
        torch.testing.assert_close(response.grad, expected)


def test_row_mean_by_hand_with_an_empty_row():
    values, row = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([2, 0, 2])
    assert objective.row_mean(values, row, 4).tolist() == [2.0, 0.0, 3.5, 0.0]
    weighted = objective.row_mean(values, row, 4, torch.tensor([4.0, 7.0, 1.0]))
    assert weighted.tolist() == [2.0, 0.0, 2.0, 0.0]


def test_the_first_label_of_each_row_weighs_more():
    assert objective.answer_weight(torch.tensor([0, 0, 0, 2, 3, 3]), 5.0).tolist() == [5.0, 1.0, 1.0, 5.0, 5.0, 1.0]
    assert objective.answer_weight(torch.tensor([], dtype=torch.int64), 5.0).tolist() == []


class TestNll:
    @given(seed=st.integers(0, 999), scale=st.floats(0.1, 20), top=st.integers(1, 40))
    def test_a_part_of_the_vocabulary_with_its_exact_rest_is_the_whole(self, seed, scale, top):
        logits, labels = draw(5, 40, seed=seed, scale=scale), draw(5, seed=seed).mul(99).long() % 40
        tokens = torch.cat([logits.topk(top, -1).indices.flatten(), labels]).unique()
        others = torch.tensor([t for t in range(40) if t not in tokens], dtype=torch.long)
        rest = logits[:, others].double().logsumexp(-1).float()
        found = objective.restricted_nll(logits[:, tokens], torch.searchsorted(tokens, labels), rest)
        torch.testing.assert_close(found, objective.token_nll(logits, labels), rtol=1e-4, atol=1e-4)

    def test_low_precision_logits_are_summed_in_fp32(self):
        logits, labels = draw(4, 300).bfloat16(), torch.tensor([1, 2, 3, 4])
        expected = -logits.double().log_softmax(-1)[range(4), labels]
        torch.testing.assert_close(objective.token_nll(logits, labels).double(), expected, rtol=1e-5, atol=1e-5)


class TestLikely:
    @given(seed=st.integers(0, 999), scale=st.floats(0.1, 6), top=st.integers(1, 20))
    def test_holds_the_likeliest_tokens_the_labels_and_the_rest(self, seed, scale, top):
        logits, labels = draw(3, 60, seed=seed, scale=scale), draw(3, seed=seed).mul(99).long() % 60
        likely = Likely.of(logits, labels, labels[:0], top)
        assert torch.equal(likely.tokens, likely.tokens.unique()) and len(likely.tokens) <= 3 * (top + 1)
        assert torch.equal(likely.tokens[likely.places], labels)
        assert set(logits.topk(top, -1).indices.flatten().tolist()) <= set(likely.tokens.tolist())
        found = objective.restricted_nll(logits[:, likely.tokens], likely.places, likely.rest)
        torch.testing.assert_close(found, objective.token_nll(logits, labels), rtol=1e-3, atol=1e-3)

    def test_when_the_rest_is_nothing(self):
        logits = draw(3, 8)
        likely = Likely.of(logits, torch.tensor([0, 1, 2]), torch.tensor([], dtype=torch.long), 8)
        found = objective.restricted_nll(logits[:, likely.tokens], likely.places, likely.rest)
        torch.testing.assert_close(found, objective.token_nll(logits, torch.tensor([0, 1, 2])), rtol=1e-4, atol=1e-4)

    def test_spread_over_more_positions(self):
        likely = Likely.of(draw(2, 30), torch.tensor([4, 9]), torch.tensor([29, 0]), 2)
        assert {0, 4, 9, 29} <= set(likely.tokens.tolist())
        more = likely.spread(torch.tensor([0, 0, 1]), torch.tensor([4, 29, 9]))
        assert torch.equal(more.rest, likely.rest[[0, 0, 1]])
        assert torch.equal(more.tokens[more.places], torch.tensor([4, 29, 9]))
