"""Several packs in one bank: each row is answered by its pack exactly as by that pack alone, in one pass."""

import copy
import threading

import pytest
import torch

import wise_kernels
from tests.edited import FACTS, logits, same, wide_model
from tests.packs import FIXED, LEGAL, MEDICAL, NAMES, OWN, PROMPTS, ROWS, generated, new_editor, save_packs, with_packs
from tests.stored import contents
from tests.tiny import tiny_tokenizer
from wise_fast import Edit, WiseEditor, storage
from wise_fast.metrics import answer

ASKED = [prompt for prompt, _ in ROWS]
NAMED = [name for _, name in ROWS]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories of the packs, one routed by leverage and one by norms."""
    return save_packs(tmp_path_factory.mktemp("packs"), medical="score")


@pytest.fixture(scope="module")
def alone(saved):
    """By name, an editor whose model has that pack and no other."""
    loaded = {name: WiseEditor.from_pretrained(wide_model(), tiny_tokenizer(), path) for name, path in saved.items()}
    return {"default": new_editor(OWN), "__base__": new_editor(), **loaded}


@pytest.fixture(scope="module")
def served(saved):
    editor = with_packs(saved)
    return editor, editor.state


@pytest.fixture
def editor(served):
    """An editor with edits of its own and the two packs; the next test gets it as it was."""
    made, state = served
    yield made
    made.set_active(["default"])
    assert list(made.packs) == ["default", "legal", "medical"]
    made.state = state


def each(alone, rows=ROWS, **settings):
    """What every row's pack, alone on its model, makes of its prompt alone."""
    return torch.cat([generated(alone[name], [prompt], **settings) for prompt, name in rows])


def prefill(editor, prompts=PROMPTS):
    with torch.no_grad():
        out = editor.model(**editor.tokenizer(list(prompts), return_tensors="pt", padding=True)).logits
    return out, editor.routing.choice, editor.routing.scores


MODES = {
    "default": {},
    "uncached": dict(use_cache=False),
    "static": dict(cache_implementation="static"),
    "beams": dict(num_beams=3, num_return_sequences=2),
    "samples": dict(do_sample=True, top_k=1, num_return_sequences=2),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_row_gets_what_its_pack_gives_alone(editor, alone, mode):
    assert all(report.success for reports in editor.packs.values() for report in reports)
    made = generated(editor, ASKED, pack_names=NAMED, **MODES[mode])
    assert torch.equal(made, each(alone, **MODES[mode]))
    told = [editor.tokenizer.decode(row).strip() for row in generated(editor, ASKED, pack_names=NAMED)]
    for facts, name in ((OWN, "default"), (LEGAL, "legal"), (MEDICAL, "medical")):
        for fact in facts:
            assert told[ROWS.index((fact.prompt, name))].startswith(fact.target)


@pytest.mark.parametrize("family, layout", [("gpt2", "neuron"), ("gemma3", "neuron"), ("mistral", "element")])
def test_other_families_and_layouts(tmp_path, family, layout):
    saved = save_packs(tmp_path, family, layout)
    editor = with_packs(saved, family=family, layout=layout)
    loaded = {n: WiseEditor.from_pretrained(wide_model(family), tiny_tokenizer(), path) for n, path in saved.items()}
    own, base = new_editor(OWN, family, layout=layout), new_editor((), family)
    made = generated(editor, ASKED, pack_names=NAMED)
    assert len(editor.routing.choice.unique()) >= 3  # several packs are heard
    assert torch.equal(made, each({"default": own, "__base__": base, **loaded}))


@pytest.mark.parametrize("name", NAMES)
def test_scores_and_decisions_are_those_of_the_pack_alone(editor, alone, name):
    """Also where the packs beside it are scored by leverage and it is not, and the other way round."""
    out, choice, scores = prefill(alone[name])
    with editor.packs_for([name] * len(PROMPTS)):
        served_out, served_choice, served_scores = prefill(editor)
    torch.testing.assert_close(served_out, out)
    mine = (editor.projection.limits[editor.routing.packs.names[name]] < torch.inf).nonzero()[:, 0]
    if name == "__base__":
        assert len(mine) == 0 and choice is None and (served_choice == -1).all() and torch.equal(served_out, out)
        return
    assert torch.equal(served_choice, torch.where(choice < 0, choice, mine[choice.clamp_min(0)]))
    torch.testing.assert_close(served_scores[:, mine], scores)
    projection = alone[name].projection
    assert torch.equal(editor.projection.limits[:, mine].amin(0), projection.thresholds)
    assert editor.projection.leveraged[mine].all() == (projection.factors is not None)


def test_all_packs_in_one_pass(editor, monkeypatch):
    calls = []
    for op in ("dual_forward", "leverage", "route", "gated_add_"):
        inner = getattr(wise_kernels, op)
        monkeypatch.setattr(wise_kernels, op, lambda *given, op=op, inner=inner: calls.append(op) or inner(*given))
    with editor.packs_for(NAMED):
        prefill(editor, ASKED)
    assert calls == ["dual_forward", "leverage", "route", "gated_add_"]


class TestActive:
    def test_those_that_ask_for_nothing_get_the_active_packs(self, editor, alone):
        assert editor.active == ["default"]
        assert torch.equal(generated(editor, PROMPTS), generated(alone["default"], PROMPTS))
        editor.set_active(["legal"])
        assert editor.active == ["legal"]
        assert torch.equal(generated(editor, PROMPTS), generated(alone["legal"], PROMPTS))
        assert torch.equal(generated(editor, ASKED, pack_names=NAMED), each(alone))  # they may still be asked for
        for nothing in ([], ["__base__"]):
            editor.set_active(nothing)
            assert same(logits(editor.model), logits(alone["__base__"].model)) and editor.active == []

    def test_several(self, editor):
        editor.set_active(("medical", "default", "medical"))
        assert editor.active == ["medical", "default"]
        prompts = [MEDICAL[1].prompt, OWN[1].prompt]
        assert answer(editor, prompts) == [MEDICAL[1].target, OWN[1].target]

    def test_it_lasts_through_edits(self, editor, saved):
        editor.set_active(["legal", "default"])
        editor.edit(FACTS[3])
        assert answer(editor, [FACTS[3].prompt, LEGAL[1].prompt]) == [FACTS[3].target, LEGAL[1].target]
        editor.rollback()
        assert editor.active == ["legal", "default"] and answer(editor, [LEGAL[1].prompt]) == [LEGAL[1].target]


class TestHotSwap:
    def test_loading_and_deleting_leave_the_others_alone(self, saved, alone):
        editor = new_editor(OWN)
        before = logits(editor.model)
        editor.load_pack(saved["legal"], "law")
        assert same(logits(editor.model), before) and [r.edit for r in editor.packs["law"]] == list(LEGAL)
        editor.load_pack(saved["medical"], "legal")
        rows = [(prompt, name) for prompt in PROMPTS for name in ("law", "legal")]
        expected = each(alone, [(prompt, {"law": "legal", "legal": "medical"}[name]) for prompt, name in rows])
        made = generated(editor, [prompt for prompt, _ in rows], pack_names=[name for _, name in rows])
        assert torch.equal(made, expected)
        editor.set_active(["law", "default"])
        editor.delete_pack("law")
        assert editor.active == ["default"] and list(editor.packs) == ["default", "legal"]
        assert same(logits(editor.model), before)
        made = generated(editor, PROMPTS, pack_names=["legal"] * len(PROMPTS))
        assert torch.equal(made, each(alone, [(prompt, "medical") for prompt in PROMPTS]))
        editor.delete_pack("legal")
        assert same(logits(editor.model), before) and editor.projection.memories == 1

    def test_an_editor_without_edits(self, saved):
        editor = new_editor()
        before = logits(editor.model)
        assert torch.equal(*(generated(editor, PROMPTS[:2], **named) for named in ({}, dict(pack_names=NAMES[::3]))))
        editor.load_pack(saved["legal"], "legal")
        assert same(logits(editor.model), before)
        editor.set_active(["legal"])
        assert answer(editor, [LEGAL[0].prompt]) == [LEGAL[0].target]

    def test_the_editors_own_edits_stay_its_own(self, editor, tmp_path):
        new_editor(OWN).save_pretrained(tmp_path / "one")
        editor.save_pretrained(tmp_path / "other")
        one, other = contents(tmp_path / "one"), contents(tmp_path / "other")
        assert one[storage.MEMORY] == other[storage.MEMORY]

    def test_new_memories_of_the_editor(self, saved):
        """The packs' memories get other numbers when the editor opens a shard of its own."""
        editor = with_packs(saved, OWN[:1], shard_size=1)
        editor.edit(OWN[1])
        assert editor.projection.memories == 5
        rows = ((OWN[0], "default"), (OWN[1], "default"), *((f, "legal") for f in LEGAL), (MEDICAL[0], "medical"))
        made = generated(editor, [fact.prompt for fact, _ in rows], pack_names=[name for _, name in rows])
        for row, (fact, _) in zip(made, rows, strict=True):
            assert editor.tokenizer.decode(row).strip().startswith(fact.target)

    def test_loading_within_inference_mode(self, saved):
        editor = new_editor(OWN)
        with torch.inference_mode():
            editor.load_pack(saved["legal"], "legal")
        editor.set_active(["legal"])
        with torch.inference_mode():
            editor.set_active(["legal", "default"])
        assert answer(editor, [LEGAL[1].prompt]) == [LEGAL[1].target]

    def test_what_is_asked_or_active_compiles_nothing_again(self, editor):
        given = dict(editor.tokenizer([*PROMPTS[:2]] * 2, return_tensors="pt", padding=True), use_cache=False)
        torch._dynamo.reset()
        compiled = torch.compile(lambda: editor.model(**given).logits, backend="aot_eager", fullgraph=True)

        def run(active, names=None):
            editor.set_active(active)
            with torch.no_grad(), editor.routing.packs.naming(names):
                torch.testing.assert_close(compiled(), editor.model(**given).logits)
            return editor.routing.choice.tolist()

        run(["default"]), run(["default"], NAMED[:4])
        with torch.compiler.set_stance("fail_on_recompile"):
            assert run(["legal"]) == [1, 2, 1, 2] and run(["medical"]) == [3] * 4 and run([]) == [-1] * 4
            assert run(["default"]) == [0, -1, 0, -1] and run(["default", "medical"])[1::2] == [3, 3]
            assert run([], ["medical", "__base__", "legal", "default"]) == [3, -1, 1, -1]
            assert run(["legal"], ["__base__"] * 3 + ["medical"]) == [-1, -1, -1, 3]

    @pytest.mark.parametrize("medical", ["leverage", "score"])
    def test_packs_that_come_and_go_in_reserved_room_compile_nothing_again(self, tmp_path, medical):
        """Hot swap: the room holds packs of either kind of score, and names for as many packs as memories."""
        saved = save_packs(tmp_path, medical=medical)
        editor = new_editor(OWN)
        editor.reserve(4)
        given = dict(editor.tokenizer([*PROMPTS[:2]] * 2, return_tensors="pt", padding=True), use_cache=False)
        torch._dynamo.reset()
        compiled = torch.compile(lambda: editor.model(**given).logits, backend="aot_eager", fullgraph=True)

        def run(names=None):
            with torch.no_grad(), editor.routing.packs.naming(names):
                torch.testing.assert_close(compiled(), editor.model(**given).logits)
            return editor.routing.choice.tolist()

        run(), run(["default"] * 4)
        with torch.compiler.set_stance("fail_on_recompile"):
            editor.load_pack(saved["legal"], "legal")
            assert run(["legal", "__base__"] * 2) == [1, -1] * 2 and run()[0] == 0
            editor.load_pack(saved["medical"], "medical")
            assert run(["legal", "medical", "__base__", "default"]) == [1, 3, -1, -1]
            editor.set_active(["medical"])
            assert run() == [3] * 4
            editor.delete_pack("legal")
            assert run() == [1] * 4 and run(["medical", "default"] * 2) == [1, -1] * 2
            editor.load_pack(saved["legal"], "legal")
            assert run(["default", "legal"] * 2)[1] == 3
        assert editor.projection.values.shape[0] == 4 * len(editor.memories[0].index)

    def test_named_rows_of_a_room_that_is_empty(self):
        editor = new_editor()
        editor.reserve(2)
        assert generated(editor, PROMPTS[:1], pack_names=["__base__"]).shape == (1, 5)
        assert editor.routing.choice.tolist() == [-1]

    def test_the_module_by_itself_compiles_nothing_again(self, editor):
        module, a = editor.projection, torch.randn(4, 3, editor.projection.in_features)
        torch._dynamo.reset()
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            for stance, names in (("default", NAMES), ("fail_on_recompile", NAMES[::-1])):
                module.routing.rows = torch.tensor([module.routing.packs.names[name] for name in names])
                try:
                    with torch.compiler.set_stance(stance):
                        torch.testing.assert_close(compiled(a), module(a))
                finally:
                    module.routing.rows = None


class TestLife:
    def test_threads_with_packs_of_their_own(self, editor, alone):
        expected, found = each(alone), {}

        def ask(i, prompt, name):
            found[i] = generated(editor, [prompt], pack_names=[name])[0]

        threads = [threading.Thread(target=ask, args=(i, *row)) for i, row in enumerate(ROWS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.equal(torch.stack([found[i] for i in range(len(ROWS))]), expected)

    def test_a_block_and_a_generation_in_it(self, editor, alone):
        with editor.packs_for(["legal", "medical"]):
            made = generated(editor, [PROMPTS[0]] * 2)
            assert torch.equal(made, each(alone, [(PROMPTS[0], "legal"), (PROMPTS[0], "medical")]))
            made = generated(editor, PROMPTS[:1], pack_names=["medical"])  # the nearer one counts
            assert torch.equal(made, each(alone, [(PROMPTS[0], "medical")]))
            with editor.disabled():
                assert torch.equal(generated(editor, [PROMPTS[0]] * 2), generated(alone["__base__"], [PROMPTS[0]] * 2))
        assert torch.equal(generated(editor, PROMPTS), generated(alone["default"], PROMPTS))

    def test_decoding_by_hand_keeps_the_decision(self, editor):
        given = editor.tokenizer([PROMPTS[0]] * 2, return_tensors="pt")
        with torch.no_grad(), editor.packs_for(["medical", "__base__"]):
            cache = editor.model(**given, use_cache=True).past_key_values
        step = torch.tensor([[5], [6]])
        with torch.no_grad():
            editor.model(input_ids=step, past_key_values=cache)
        assert editor.routing.choice.tolist() == [3, -1]

    def test_a_deepcopy_is_independent(self, editor, alone):
        twin = copy.deepcopy(editor.model)
        editor.set_active([])
        given = editor.tokenizer(ASKED, return_tensors="pt", padding=True)
        made = twin.generate(**given, **FIXED, pack_names=NAMED)[:, given["input_ids"].shape[1] :]
        assert torch.equal(made, each(alone))

    def test_casting_keeps_the_limits(self, editor):
        module = copy.deepcopy(editor.projection).to(torch.bfloat16)
        assert torch.equal(module.limits, editor.projection.limits) and module.leveraged.dtype == torch.bool

    def test_a_state_dict_holds_what_is_active(self, editor):
        module = copy.deepcopy(editor.projection)
        editor.set_active(["legal"])
        module.load_state_dict(editor.projection.state_dict())
        a = torch.randn(3, 4, module.in_features)
        assert module.limits is None and torch.equal(module(a), editor.projection(a))
        assert torch.equal(module.leveraged, editor.projection.leveraged)

    def test_superseding_an_edit_that_a_pack_also_holds(self, editor):
        editor.edit(Edit(LEGAL[0].prompt, "new"))
        rows = generated(editor, [LEGAL[0].prompt] * 2, pack_names=["default", "legal"])
        told = [editor.tokenizer.decode(row).strip() for row in rows]
        assert told[0].startswith("new") and told[1].startswith(LEGAL[0].target)
