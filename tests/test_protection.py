"""The protected update: its matrix in closed form, the leverage factor, and what it is for."""

import pytest
import torch

from tests.edited import FACTS, make_editor
from wise_fast.protection import RANK, absorb, identity, untaught_factor


def batches(count, width, seed=0, rank=None):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(n, rank or width, generator=generator, dtype=torch.float64) for n in (3, 7, 1, 20)[:count]]
    basis = torch.randn(rank, width, generator=generator, dtype=torch.float64) if rank else None
    return [a @ basis if rank else a for a in made]


def absorbed(a, strength, dtype=torch.float64):
    """P after these batches, and the lambda that each was absorbed with."""
    p, scales = identity(a[0].shape[1], "cpu").to(dtype), []
    for batch in a:
        batch = batch.to(dtype)
        scales.append(strength * float((batch @ p * batch).sum(1).mean()))
        p = absorb(p, batch, strength)
    return p, scales


@pytest.mark.parametrize("strength", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("width", [1, 5, 24])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_it_is_the_inverse_of_the_summed_covariance(count, width, strength):
    a = batches(count, width)
    p, scales = absorbed(a, strength)
    covariance = sum(batch.t() @ batch / scale for batch, scale in zip(a, scales, strict=True))
    expected = torch.linalg.inv(torch.eye(width, dtype=torch.float64) + covariance)
    torch.testing.assert_close(p, expected, rtol=1e-9, atol=1e-9)
    single, _ = absorbed(a, strength, torch.float32)
    torch.testing.assert_close(single.double(), expected, rtol=1e-3, atol=1e-5)


def test_it_is_symmetric_shrinks_and_stays_positive():
    p = identity(24, "cpu")
    for i, batch in enumerate(4 * batches(4, 24)):
        before, p = p, absorb(p, batch.float(), 1.0)
        torch.testing.assert_close(p, p.t(), rtol=0, atol=1e-6)
        assert float(torch.linalg.eigvalsh(p)[0]) > -1e-6
        assert float(torch.linalg.eigvalsh(before - p)[0]) > -1e-5, i
        assert 0 < float(p.trace()) < float(before.trace()) <= 24


def test_absorbing_leaves_its_arguments():
    p, a = identity(6, "cpu"), batches(1, 6)[0].float()
    kept = p.clone(), a.clone()
    absorb(p, a, 1.0)
    assert torch.equal(p, kept[0]) and torch.equal(a, kept[1])


def test_activations_of_nothing_change_nothing():
    p = absorb(identity(6, "cpu"), torch.zeros(3, 6), 1.0)
    assert torch.equal(p, identity(6, "cpu"))


def movement(protect):
    """How far later edits move the first one's response on its prompt, as a share of the response."""
    editor = make_editor([FACTS[0]], batch_size=1, protect=protect)
    _, key = editor._state.shard.keys[0]
    before = editor.memories[0].respond(key)
    editor.edit(FACTS[1:])
    return float((editor.memories[0].respond(key) - before).norm() / before.norm())


def test_later_edits_move_earlier_ones_less():
    assert movement(protect=True) < 0.7 * movement(protect=False)


def test_what_the_editor_absorbs():
    """Every row's tokens behind its prefix, and lambda in units of the edit's own mean a P a^T."""
    editor = make_editor([FACTS[0]], protect_lambda=2.0, protect_irrelevant=None)
    p = editor._state.shard.p
    rows = editor.examples([FACTS[0]], [0])[0]
    assert any(row.context for row in rows)
    ids = [torch.tensor([[*row.prompt, *row.target[:-1]]]) for row in rows]
    taught = zip(rows, ids, strict=True)
    a = torch.cat([editor.tail.capture(given, torch.ones_like(given)).a[row.context :] for row, given in taught])
    a = editor.memories[0].select(a)
    scale = 2.0 * float(a.square().sum(1).mean())
    expected = torch.linalg.inv(torch.eye(len(p)) + a.t() @ a / scale)
    torch.testing.assert_close(p, expected, rtol=1e-3, atol=1e-4)


def test_unrelated_text_is_protected_before_the_first_edit():
    editor = make_editor(protect_irrelevant=0.5)
    shard = editor._open_shard(editor._state).shard
    quiet = shard.memory.select(editor._quiet_pool.a)
    expected = absorb(identity(len(shard.p), "cpu"), quiet, 0.5)
    assert shard.p is shard.origin and torch.equal(shard.p, expected)
    assert float((quiet @ shard.p).norm()) < 0.7 * float(quiet.norm())


def test_the_factor_says_how_much_of_a_prompt_was_not_taught():
    """To within what chance does to a sum of many tokens, for what was taught and for what was not."""
    taught, new = torch.randn(2, 200, 300, generator=torch.Generator().manual_seed(1))
    p = absorb(torch.eye(300), taught[:100], 0.5)
    factor = untaught_factor(p)
    assert factor.shape == (300, RANK) and torch.equal(factor, untaught_factor(p.clone()))
    prompts = taught[:100], new
    exact = torch.stack([((a @ p) * a).sum() for a in prompts])
    found = torch.stack([(a @ factor).square().sum() for a in prompts])
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0)
    assert exact[0] < 0.5 * exact[1]


def test_a_factor_is_never_wider_than_its_matrix():
    assert untaught_factor(torch.eye(5)).shape == (5, 5)


def test_without_protection_there_is_no_matrix():
    assert make_editor([FACTS[0]], protect=False)._state.shard.p is None
    assert make_editor([FACTS[0]], layout="element")._state.shard.p is None


def test_a_matrix_that_is_no_protection_is_refused():
    with pytest.raises(ValueError, match="not positive"):
        untaught_factor(-torch.eye(300))


def test_rounding_errors_that_leave_a_matrix_not_quite_positive_do_no_harm():
    """As after many updates: its least eigenvalues are of the size of what they were rounded by."""
    p = torch.eye(300)
    p[0, 0] = -1e-6
    a = torch.randn(50, 300, generator=torch.Generator().manual_seed(1))
    found, exact = (a @ untaught_factor(p)).square().sum(), ((a @ p) * a).sum()
    assert float(found) == pytest.approx(float(exact), rel=0.1)
