"""Shards: when they open and close, TIES merges against a dense computation, banks and who answers from them."""

import pytest
import torch

from tests.edited import D_FF, FACTS, WIDTH, logits, make_editor
from wise_fast.memory import Bank, SideMemory, alike
from wise_fast.merging import close_shard, merge_memories
from wise_fast.metrics import answer
from wise_fast.state import EditorState, Shard

LAYOUTS = ("neuron", "element")
SHAPE = (6, 40)


def make_memory(layout, seed, edits, threshold=1.0, ratio=0.5):
    generator = torch.Generator().manual_seed(seed)
    memory = SideMemory.blank(layout, SHAPE, ratio, generator, "cpu")
    values = torch.randn(memory.values.shape, generator=generator)
    return memory.replace(values=values, threshold=threshold, edits=edits, factor=torch.ones(len(values), 2))


def mask_of(memory):
    return memory.replace(values=torch.ones_like(memory.values)).dense().bool()


def dense_ties(memories, density):
    """TIES of whole matrices, weighted by edits."""
    trimmed = []
    for memory in memories:
        dense = memory.dense()
        keep = int(density * memory.values.numel() + 0.5)
        cut = memory.values.abs().flatten().sort(descending=True).values[keep - 1]
        trimmed.append(torch.where(dense.abs() >= cut, dense, 0.0))
    stack = torch.stack(trimmed)
    elected = stack.sum(0).sign()
    weights = torch.tensor([float(len(m.edits)) for m in memories])[:, None, None]
    agree = ((stack.sign() == elected) & (stack != 0)) * weights
    return (agree * stack).sum(0) / agree.sum(0).clamp_min(1)


class TestMerge:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_it_is_the_dense_computation(self, layout, density, count):
        memories = [make_memory(layout, i, tuple(range(9 * i, 9 * i + 1 + 2 * i)), 2.0 - i / 4) for i in range(count)]
        merged = merge_memories(memories, density)
        torch.testing.assert_close(merged.dense(), dense_ties(memories, density))
        assert torch.equal(mask_of(merged), torch.stack([mask_of(m) for m in memories]).any(0))
        assert merged.threshold == 2.0 - (count - 1) / 4 and merged.factor is None
        assert merged.z_threshold == float("inf") and merged.taught is None
        assert merged.edits == sum((m.edits for m in memories), ())
        assert (merged.layout, merged.shape) == (layout, SHAPE)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_a_memory_weighs_as_many_edits_as_it_holds(self, layout):
        one = make_memory(layout, 0, (0, 1, 2), ratio=1.0)
        other = one.replace(values=3 * one.values, edits=(3,))
        merged = merge_memories([one, other], 1.0)
        torch.testing.assert_close(merged.values, one.values * (3 * 1 + 1 * 3) / 4)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_merged_memories_can_be_served_and_merged_again(self, layout):
        memories = [make_memory(layout, i, (i,)) for i in range(3)]
        again = merge_memories([merge_memories(memories[:2], 1.0), memories[2]], 1.0)
        a = torch.randn(5, SHAPE[1])
        torch.testing.assert_close(again.respond(again.select(a)), a @ again.dense().t(), rtol=1e-4, atol=1e-5)
        assert Bank.join(alike([again], "leverage"), torch.float32).bounds.tolist() == [0, again.values.shape[0]]

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_merging_leaves_its_arguments(self, layout):
        memories = [make_memory(layout, i, (i,)) for i in range(2)]
        kept = [(m.values.clone(), m.index.clone()) for m in memories]
        merge_memories(memories, 0.3)
        assert all(torch.equal(m.values, v) and torch.equal(m.index, i) for m, (v, i) in zip(memories, kept))


class TestBlank:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("ratio", [0.01, 0.2, 0.6, 1.0])
    def test_density_and_seed(self, layout, ratio):
        made = [
            SideMemory.blank(layout, (WIDTH, D_FF), ratio, torch.Generator().manual_seed(seed), "cpu")
            for seed in (0, 0, 1)
        ]
        masks = [mask_of(memory) for memory in made]
        assert torch.equal(masks[0], masks[1])
        assert float(masks[0].float().mean()) == pytest.approx(ratio, abs=0.005)
        assert not made[0].dense().any() and made[0].edits == () and made[0].threshold == float("inf")
        if ratio < 1:  # Theorem 2.1: two masks share rho^2
            assert not torch.equal(masks[0], masks[2])
            assert float((masks[0] & masks[2]).float().mean()) == pytest.approx(ratio**2, abs=0.04)

    def test_there_is_always_something_to_write(self):
        assert len(SideMemory.blank("neuron", (4, 8), 0.001, torch.Generator(), "cpu").values) == 1


class TestClosing:
    def state(self, edits=2, **changes):
        memory = make_memory("neuron", 0, tuple(range(edits)))
        return EditorState(shard=Shard(memory, torch.eye(len(memory.values))), opened=1).replace(**changes)

    def test_retrieve_keeps_every_shard_as_it_is(self):
        open_one = self.state()
        state = close_shard(open_one, make_editor().config)
        assert state.shard is None and state.merged == (open_one.shard.memory,)
        assert state.closed == () and state.merges == 0

    def test_merge_waits_for_its_group(self):
        config = make_editor(mode="merge", merging="ties", shards=2, shard_size=2).config
        waiting = close_shard(self.state(), config)
        assert waiting.merged == () and len(waiting.closed) == 1 and waiting.merges == 0
        merged = close_shard(self.state(closed=waiting.closed), config)
        assert len(merged.merged) == 1 and merged.closed == () and merged.merges == 1
        again = close_shard(self.state(merged=merged.merged, closed=waiting.closed, merges=1), config)
        assert len(again.merged) == 1 and again.merges == 2 and len(again.merged[0].edits) == 4 + 2 + 2


class TestEditorShards:
    def test_shards_open_when_full_and_batches_stop_at_their_end(self):
        editor = make_editor(FACTS, shard_size=3)
        assert [m.edits for m in editor.memories] == [(0, 1, 2), (3,)]
        assert editor._state.opened == 2 and editor.projection.memories == 2
        assert not torch.equal(editor.memories[0].index, editor.memories[1].index)

    @pytest.mark.parametrize("route_by", ["leverage", "score"])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_a_bank_answers_from_the_right_memory(self, route_by, layout):
        editor = make_editor(FACTS, shard_size=1, route_by=route_by, layout=layout)
        with_factors = route_by == "leverage" and layout == "neuron"
        assert (editor.projection.factors is not None) == with_factors
        assert answer(editor, [f.prompt for f in FACTS]) == [f.target for f in FACTS]
        for number, fact in enumerate(FACTS):
            logits(editor.model, [fact.prompt])
            assert int(editor.routing.choice) == number

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_merge_mode_merges_every_group(self, layout):
        """As soon as its last shard is full, not when the next one opens."""
        settings = dict(shard_size=1, mode="merge", merging="ties", shards=2, density=1.0)
        editor = make_editor(FACTS[:3], layout=layout, **settings)
        assert [m.edits for m in editor.memories] == [(0, 1), (2,)] and editor._state.merges == 1
        assert editor._state.shard is None
        state = editor._state
        editor.config = editor.config.replace(shards=3)
        editor.edit(FACTS[3])
        closing = editor._state.memories
        assert [m.edits for m in closing] == [(0, 1), (2,), (3,)] and editor._state.merges == 1
        editor.rollback()
        assert editor._state is state
        editor.config = editor.config.replace(shards=2)
        editor.edit(FACTS[3])
        assert [m.edits for m in editor.memories] == [(0, 1, 2, 3)] and editor._state.merges == 2
        torch.testing.assert_close(editor.memories[0].dense(), dense_ties(closing, 1.0))

    def test_columns_outside_the_mask_add_nothing(self):
        editor = make_editor(FACTS)
        memory, projection = editor.memories[0], editor.projection
        projection.thresholds.fill_(0.0)
        a = torch.randn(2, 3, D_FF)
        a[..., memory.index] = 0
        assert torch.equal(projection(a), projection.base_layer(a))
        a[..., memory.index[0]] = 1
        assert not torch.equal(projection(a), projection.base_layer(a))
