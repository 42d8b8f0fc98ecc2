"""Room in a bank: served alike whether it is full or not, saved by what it holds, changed in place."""

import copy
import io

import pytest
import safetensors.torch
import torch
from torch import nn

from tests.edited import FACTS, logits, make_editor, same, untouched
from tests.test_ffn import D_FF, D_OUT, LAYOUTS, inputs, make_bank, make_base, make_memories
from wise_fast import capacity
from wise_fast.errors import ConfigError
from wise_fast.ffn import DualMemoryLinear
from wise_fast.memory import Bank, alike

ROOM = {"neuron": (4, 4 * D_FF), "element": (4, 4 * D_FF * D_OUT)}
NAMES = ("values", "index", "bounds", "thresholds", "factors")


def roomy(layout, bank=None, rank=None):
    module = DualMemoryLinear(make_base())
    module.reserve(*ROOM[layout], rank, layout)
    module.set_bank(bank)
    return module


def tight(bank):
    module = DualMemoryLinear(make_base())
    module.set_bank(bank)
    return module


def leveraged(count, seed=0, rank=5):
    """A bank in the neuron layout whose scores are over the root of their leverage."""
    memories = [
        m.replace(factor=torch.randn(len(m.index), rank, generator=torch.Generator().manual_seed(i)), z_threshold=0.5)
        for i, m in enumerate(make_memories("neuron", (0.5,) * count, seed))
    ]
    return Bank.join(alike(memories, "leverage"), torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_free_slots_change_nothing(layout, count):
    bank, a = make_bank(layout, (5.0, 5.5, 6.0, 4.0)[:count]), inputs(6, 5)
    module, expected = roomy(layout, bank), tight(bank)
    torch.testing.assert_close(module(a), expected(a))
    assert torch.equal(module.routing.choice, expected.routing.choice) and (module.routing.choice >= 0).any()
    torch.testing.assert_close(module.routing.scores[:, :count], expected.routing.scores)
    assert not module.routing.scores[:, count:].any()
    assert module.memories == count and module.layout == layout and f"memories={count}" in repr(module)
    outside = module.routing.choice < 0
    assert torch.equal(module(a)[outside], module.base_layer(a)[outside])


def test_free_slots_and_leverage():
    bank, a = leveraged(2), inputs(6, 5)
    module, expected = roomy("neuron", bank, rank=8), tight(bank)
    torch.testing.assert_close(module(a), expected(a))
    torch.testing.assert_close(module.routing.scores[:, :2], expected.routing.scores)
    assert torch.equal(module.routing.choice, expected.routing.choice) and (module.routing.choice >= 0).any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_room_without_memories_serves_the_main_memory(layout):
    module, a = roomy(layout), inputs(3, 4)
    assert module.memories == 0 and torch.equal(module(a), module.base_layer(a))
    assert module.routing.choice.tolist() == [-1] * 3
    assert set(module.state_dict()) == {"base_layer.weight", "base_layer.bias"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_banks_that_fit_are_copied_and_leave_nothing_behind(layout):
    module, a = roomy(layout), inputs(6, 5)
    places = [getattr(module, name).data_ptr() for name in NAMES[:4]]
    for count, ratio in ((3, 0.9), (1, 0.2), (0, 0.5), (2, 0.5)):
        bank = make_bank(layout, (5.0,) * count, seed=count, ratio=ratio) if count else None
        kept = None if bank is None else copy.deepcopy(bank)
        module.set_bank(bank)
        torch.testing.assert_close(module(a), tight(kept)(a))
        assert module.memories == count
        assert places == [getattr(module, name).data_ptr() for name in NAMES[:4]]
    other = make_bank(layout, (1e6,), seed=9)
    module.set_bank(other)
    assert torch.equal(bank.values, kept.values) and torch.equal(bank.thresholds, kept.thresholds)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_outgrows_its_room_is_served_from_twice_as_much(layout):
    bank, a = make_bank(layout, (5.0,) * 5), inputs(6, 5)
    module = roomy(layout)
    module.set_bank(bank)
    torch.testing.assert_close(module(a), tight(bank)(a))
    assert module.memories == 5 and module.thresholds.shape == (8,) and module.reserved
    place = module.values.data_ptr()
    module.set_bank(make_bank(layout, (5.0,) * 2))
    assert module.values.data_ptr() == place


@pytest.mark.parametrize("here", LAYOUTS)
@pytest.mark.parametrize("there", LAYOUTS)
def test_a_state_dict_has_the_size_of_what_is_held(here, there):
    bank, a = make_bank(here, (5.0, 5.5)), inputs(6, 5)
    saved, expected = roomy(here, bank).state_dict(), tight(bank).state_dict()
    assert saved.keys() == expected.keys() and all(torch.equal(saved[k], expected[k]) for k in saved)
    for module in (roomy(there, make_bank(there, (1.0,))), roomy(there), DualMemoryLinear(make_base())):
        module.load_state_dict(saved)
        torch.testing.assert_close(module(a), tight(bank)(a))
        assert (module.memories, module.layout) == (2, here)
    module = roomy(here)
    place = module.values.data_ptr()
    module.load_state_dict(saved)
    assert module.values.data_ptr() == place
    module.load_state_dict(make_base().state_dict() and DualMemoryLinear(make_base()).state_dict())
    assert module.memories == 0 and module.reserved


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_saved_state_has_no_room_in_it(layout, tmp_path):
    def size(module):
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        return len(file.getvalue())

    bank = make_bank(layout, (5.0,))
    assert size(roomy(layout, bank)) < 1.05 * size(tight(bank))
    module = roomy("neuron", leveraged(2), rank=8)
    safetensors.torch.save_file(module.state_dict(), tmp_path / "state.safetensors")
    saved = module.state_dict()
    kept = copy.deepcopy(saved)
    module.set_bank(leveraged(1, seed=3))
    assert all(torch.equal(saved[name], kept[name]) for name in kept)  # what is served later is not in it


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_held_may_be_served_again(layout):
    bank, a = make_bank(layout, (5.0, 5.5)), inputs(6, 5)
    module = roomy(layout, bank)
    expected, held = module(a), module.held
    module.set_bank(module.held)
    assert torch.equal(module(a), expected)
    module.set_bank(None)
    module.set_bank(held)
    assert torch.equal(module(a), expected) and (module.routing.choice >= 0).any()


def test_what_cannot_be_reserved():
    module = DualMemoryLinear(make_base())
    with pytest.raises(ConfigError, match="layout is 'neurons'"):
        module.reserve(2, D_FF, layout="neurons")
    with pytest.raises(ConfigError, match="rank is 8"):
        module.reserve(2, D_FF, 8, "element")
    assert not module.reserved and module.bounds is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_room_for_memories_that_ties_merges(layout):
    """What was merged takes up to all columns, whatever share of them each shard has."""
    changes = dict(layout=layout, mode="merge", merging="ties", shards=2, shard_size=1, batch_size=1, mask_ratio=0.3)
    editor = make_editor(**changes)
    editor.reserve(memories=3)
    place = editor.projection.values.data_ptr()
    for fact in (*FACTS, *FACTS[:2]):
        editor.edit(fact)
        assert editor.projection.values.data_ptr() == place and editor.projection.memories <= 3


def test_life_as_a_module():
    module, a = roomy("neuron", leveraged(2), rank=8), inputs(6, 5)
    twin = copy.deepcopy(module)
    twin.set_bank(None)
    assert (module.memories, twin.memories) == (2, 0) and torch.equal(twin(a), twin.base_layer(a))
    thresholds = module.thresholds.clone()
    module.bfloat16()
    assert module.values.dtype == torch.bfloat16 and torch.equal(module.thresholds, thresholds)
    assert module(a.bfloat16()).dtype == torch.bfloat16 and module.memories == 2
    module = DualMemoryLinear(make_base())
    with torch.inference_mode():
        module.reserve(*ROOM["neuron"])
    module.set_bank(make_bank("neuron", (5.0,)))
    module(a)


def test_room_that_is_too_small_is_refused():
    bank, a = make_bank("neuron", (5.0, 5.0)), inputs(2, 3)
    module = tight(bank)
    expected = module(a)
    for given, message in (
        ((1, 4 * D_FF), "reserved are 1 memories .* takes 2 memories"),
        ((2, 3), "of 3 values"),
        ((4, 10**3, None, "element"), "element layout, .* neuron layout"),
        ((0, 5), "memories is 0"),
        ((2, 2.5), "rows is 2.5"),
        ((2, 5, 0), "rank is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            module.reserve(*given)
    assert torch.equal(module(a), expected) and module.values is bank.values and not module.reserved


@pytest.mark.parametrize("changes", [{}, {"layout": "element", "protect": False, "route_by": "score"}], ids=LAYOUTS)
def test_an_editor_fills_what_it_reserved(changes):
    editor, plain = (make_editor(shard_size=2, batch_size=1, seed=1, **changes) for _ in range(2))
    before = logits(editor.model)
    editor.reserve(memories=2)
    assert same(logits(editor.model), before)
    module = editor.projection
    places = {name: b.data_ptr() for name, b in module.named_buffers() if b is not None}
    for count in (1, 2, 3):
        editor.edit(FACTS[count - 1])
        plain.edit(FACTS[count - 1])
        assert module.memories == len(editor.memories) == (count + 1) // 2
        assert places == {name: b.data_ptr() for name, b in module.named_buffers() if b is not None}
        for one, other in zip(logits(editor.model), logits(plain.model), strict=True):
            torch.testing.assert_close(one, other)
    editor.rollback(3)
    assert module.memories == 0 and same(logits(editor.model), before)
    for wrong in (0, "3", 1.5):
        with pytest.raises(ConfigError, match="memories is"):
            editor.reserve(wrong)


def test_what_is_interrupted_while_it_is_copied_is_taken_back(monkeypatch):
    editor = make_editor(FACTS[:1])
    editor.reserve(memories=1)
    put = capacity.put

    def interrupted(room, bank):
        monkeypatch.undo()
        room.values.zero_()
        raise KeyboardInterrupt

    for act in (editor.rollback, lambda: editor.edit(FACTS[1])):
        with untouched(editor):
            monkeypatch.setattr(capacity, "put", interrupted)
            with pytest.raises(KeyboardInterrupt):
                act()
            assert capacity.put is put


def test_a_loaded_editor_reserves_for_what_it_holds_and_more():
    editor = make_editor(FACTS[:2], shard_size=1, batch_size=1)
    expected = logits(editor.model)
    with pytest.raises(ConfigError, match="takes 2 memories"):
        editor.reserve(memories=1)
    editor.reserve(memories=3)
    for one, other in zip(logits(editor.model), expected, strict=True):
        torch.testing.assert_close(one, other)
    saved = editor.model.state_dict()
    assert saved[f"{editor.architecture.projection}.thresholds"].shape == (2,)
    assert isinstance(editor.unload(), nn.Module)
