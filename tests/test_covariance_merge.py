"""Merging weighted by covariances: its normal equations, what it keeps, and who takes part."""

import statistics

import pytest
import torch

from tests.edited import FACTS, make_editor
from wise_fast.memory import SideMemory, Taught
from wise_fast.merging import _RIDGE, _SAMPLE, merge_by_covariance
from wise_fast.metrics import answer
from wise_fast.protection import absorb

WIDTH, OUT = 30, 6
REGMEAN = dict(mode="merge", merging="regmean", mask_ratio=1.0)
CONFIG = make_editor(**REGMEAN).config


def taught_memory(number, origin, prompts):
    """A memory with random values that was taught these prompts, each [tokens, WIDTH], and its P."""
    p = origin
    for prompt in prompts:
        p = absorb(p, prompt, 0.5)
    values = torch.randn(WIDTH, OUT, generator=torch.Generator().manual_seed(number))
    edits = tuple(range(100 * number, 100 * number + len(prompts)))
    information = (torch.linalg.inv(p.double()) - torch.linalg.inv(origin.double())).float()
    taught = Taught(information, origin, tuple(zip(edits, prompts, strict=True)))
    return SideMemory("neuron", values, torch.arange(WIDTH), (OUT, WIDTH), edits=edits, taught=taught), p


@pytest.fixture
def three():
    rng = torch.Generator().manual_seed(5)
    origin = absorb(torch.eye(WIDTH), torch.randn(9, WIDTH, generator=rng), 0.3)
    prompts = [torch.randn(2, 4, WIDTH, generator=rng) for _ in range(3)]
    return [taught_memory(i, origin, list(given)) for i, given in enumerate(prompts)], prompts, origin


def test_it_solves_the_normal_equations(three):
    memories, _, origin = three
    (merged,) = merge_by_covariance([m for m, _ in memories], CONFIG)
    before = torch.linalg.inv(origin)
    covariances = [torch.linalg.inv(p) - before for _, p in memories]
    left = (sum(covariances) + _RIDGE * before) @ merged.values
    right = sum(c @ m.values for c, (m, _) in zip(covariances, memories, strict=True))
    torch.testing.assert_close(left, right, rtol=2e-3, atol=2e-3 * float(right.abs().max()))
    assert merged.edits == (0, 1, 100, 101, 200, 201)
    assert [edit for edit, _ in merged.taught.keys] == list(merged.edits)


def test_it_leaves_as_new_what_no_memory_was_taught(three):
    """Its leverage is that of one memory that was taught everything, whichever order they were merged in."""
    memories, prompts, origin = three
    (merged,) = merge_by_covariance([m for m, _ in memories], CONFIG)
    p = origin
    before = torch.linalg.inv(origin)
    p = torch.linalg.inv(before + sum(torch.linalg.inv(q) - before for _, q in memories))
    new = torch.randn(500, WIDTH, generator=torch.Generator().manual_seed(9))
    for a in (*(torch.cat(list(given)) for given in prompts), new):
        exact, found = ((a @ p) * a).sum(), (a @ merged.factor).square().sum()
        torch.testing.assert_close(found, exact, rtol=0.5, atol=0)
    (pair,) = merge_by_covariance([memories[0][0], memories[1][0]], CONFIG)
    (nested,) = merge_by_covariance([pair, memories[2][0]], CONFIG)
    torch.testing.assert_close(nested.taught.information, merged.taught.information, rtol=1e-3, atol=1e-2)


def test_memories_that_were_taught_different_things_keep_their_answers():
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(2)))[0].t() * 5
    parts = [[basis[i : i + 2], basis[i + 2 : i + 4]] for i in (0, 4)]
    memories = [taught_memory(i, torch.eye(WIDTH), part)[0] for i, part in enumerate(parts)]
    (merged,) = merge_by_covariance(memories, CONFIG)
    for memory, part in zip(memories, parts, strict=True):
        for prompt in part:
            torch.testing.assert_close(merged.respond(prompt), memory.respond(prompt), rtol=0.1, atol=0.3)


def test_a_memory_that_was_loaded_stays_as_it_is(three):
    (first, second, third), *_ = three
    loaded = first[0].replace(taught=None)
    kept, merged = merge_by_covariance([loaded, second[0], third[0]], CONFIG)
    assert kept is loaded and merged.edits == (100, 101, 200, 201)
    assert merge_by_covariance([loaded, third[0]], CONFIG) == (loaded, third[0])


def test_the_sample_that_thresholds_are_taken_from_does_not_grow():
    prompts = [torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(80)]
    memories = [taught_memory(i, torch.eye(WIDTH), prompts)[0] for i in range(3)]
    (merged,) = merge_by_covariance(memories, CONFIG)
    kept = [edit for edit, _ in merged.taught.keys]
    assert len(kept) == _SAMPLE and kept == sorted(kept) and len(set(kept)) == _SAMPLE and kept[-1] > 250


def test_an_edit_that_a_merge_has_lost_does_not_open_it_to_everything(three):
    """Its response is small by now, and who is quieter than it must stay out."""
    memories, *_ = three
    lost = memories[0][0].taught.keys[0][1]
    quiet = memories[0][0].replace(values=memories[0][0].values * 1e-3)
    (merged,) = merge_by_covariance([quiet, memories[1][0], memories[2][0]], CONFIG)
    z = [float(merged.respond(key).norm(dim=1).mean()) / merged.spread(key) for _, key in merged.taught.keys]
    assert merged.z_threshold == pytest.approx(CONFIG.z_ratio * statistics.median(z), rel=1e-5)
    assert float(merged.respond(lost).norm(dim=1).mean()) / merged.spread(lost) < merged.z_threshold


class TestEditor:
    @pytest.fixture(scope="class")
    @classmethod
    def editor(cls):
        return make_editor(FACTS, shard_size=1, shards=2, **REGMEAN)

    def test_one_memory_answers_all_edits(self, editor):
        assert [m.edits for m in editor.memories] == [tuple(range(len(FACTS)))]
        assert editor._state.merges == len(FACTS) // 2 and editor.projection.factors is not None
        assert answer(editor, [f.prompt for f in FACTS]) == [f.target for f in FACTS]

    def test_ties_loses_what_it_keeps(self, editor):
        ties = make_editor(FACTS, shard_size=1, shards=2, **REGMEAN | {"merging": "ties"})
        right = [a == f.target for a, f in zip(answer(ties, [f.prompt for f in FACTS]), FACTS, strict=True)]
        assert not all(right)
