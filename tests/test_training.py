"""One batch's training: its gradient against a plain model with a dense delta, its stopping, and what it reports."""

import pytest
import torch
from torch import nn

from tests.edited import D_FF, FACTS, QUICK, WIDTH, logits, make_editor, make_trainer
from wise_fast import Edit, training
from wise_fast.standing import Standing
from wise_fast.tasks import evaluate
from wise_fast.training import Trainer
from wise_fast.vocabulary import Likely

LAYOUTS = ("neuron", "element")


def weighted_nll(config, logits, target):
    """Mean NLL of the target's tokens, the first of them weighted."""
    nll = nn.functional.cross_entropy(logits, torch.tensor(target), reduction="none")
    weight = torch.tensor([config.first_token] + [1.0] * (len(target) - 1))
    return (nll * weight).sum() / weight.sum()


def plain_loss(editor, trainer, facts, delta):
    """The whole loss by ordinary forwards of the model, row by row, with a dense delta [d_out, d_ff]; with the
    trainer's `last_dropout` of 1, no augmented prompt's last token responds."""
    config, unit = editor.config, editor.unit
    kept, silent = [], []

    def hook(_module, args, output):
        kept.append(args[0] @ delta.t())
        heard = torch.ones_like(kept[-1])
        heard[:, silent] = 0.0
        return output + kept[-1] * heard

    handle = editor.projection.register_forward_hook(hook)
    losses, scores = [], []
    for rows in editor.examples(facts, range(len(facts))):
        for variant, row in enumerate(rows):
            ids = torch.tensor([[*row.prompt, *row.target[:-1]]])
            silent[:] = [len(row.prompt) - 1] if variant and trainer.last_dropout == 1 else []
            found = editor.model(ids).logits[0, len(row.prompt) - 1 :]
            losses.append(weighted_nll(config, found, row.target))
            scores.append(kept[-1][0, row.context : len(row.prompt)].norm(dim=-1).mean() / unit)
    handle.remove()
    norms = (trainer.quiet.texts.a @ delta.t()).norm(dim=-1) / unit
    quiet = torch.stack([norms[trainer.quiet.texts.text == i].mean() for i in range(len(trainer.quiet.texts.limit))])
    edits, weight = torch.stack(scores), config.margin_weight
    margins = (config.beta - edits).clamp_min(0) + (config.gamma - (edits - quiet.max())).clamp_min(0)
    per_row = torch.stack(losses) + weight * margins
    return per_row.view(len(facts), -1).mean(1).sum() + weight * (quiet - config.alpha).clamp_min(0).sum()


class TestGradient:
    @pytest.mark.parametrize("dropout", [0.0, 1.0])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_a_step_is_the_masked_gradient_of_the_plain_loss(self, layout, dropout):
        settings = dict(lr=0.5, alpha=1e-3, mask_ratio=0.3, first_token=3.0)
        editor = make_editor(layout=layout, optimizer="sgd", units="absolute", **settings)
        size = editor._open_shard(editor._state).shard.memory.values.shape
        values = 0.01 * torch.randn(size, generator=torch.Generator().manual_seed(2))
        trainer = make_trainer(editor, FACTS[:2], values)
        trainer.last_dropout = dropout
        delta = trainer.memory.dense().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(plain_loss(editor, trainer, FACTS[:2], delta), delta)
        trainer._begin_anew([0, 1])
        trainer._step([0, 1], [0, 1, 2, 3])
        step = trainer.memory.replace(values=trainer.z).dense()
        mask = trainer.memory.replace(values=torch.ones_like(values)).dense()
        assert gradient.abs().max() > 1e-3 and not torch.equal(gradient * mask, gradient)
        torch.testing.assert_close(step, -0.5 * gradient * mask, rtol=1e-3, atol=2e-5)

    def test_protection_maps_the_gradient(self):
        editor = make_editor(optimizer="sgd", units="absolute", lr=0.5)
        count = round(0.6 * D_FF)
        generator = torch.Generator().manual_seed(3)
        half = torch.randn(count, count, generator=generator) / count**0.5
        p = half @ half.t()
        free, protected = (make_trainer(editor, FACTS[:1], p=matrix) for matrix in (None, p))
        for trainer in (free, protected):
            trainer._begin_anew([0])
            trainer._step([0], [0, 1])
        torch.testing.assert_close(protected.z, p @ free.z, rtol=1e-3, atol=1e-5)
        before, z = protected.memory.values, protected.z.clone()
        protected._settle([0])
        assert float(protected.p.trace()) < float(p.trace())
        assert torch.equal(protected.z, z)
        protected.z += 2 * z  # of steps under the new P
        written = before + p @ z + protected.p @ (2 * z)
        protected._write()
        torch.testing.assert_close(protected.memory.values, written, rtol=1e-4, atol=1e-5)
        expected = protected.memory.respond(protected.quiet.selected)
        torch.testing.assert_close(protected.quiet.before, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_nothing_but_masked_values_is_kept_or_trained(self, layout):
        editor = make_editor(layout=layout, mask_ratio=0.2)
        before = {name: p.detach().clone() for name, p in editor.model.named_parameters()}
        trainer = make_trainer(editor, FACTS[:2])
        size = trainer.memory.values.shape
        assert size.numel() < 0.22 * WIDTH * D_FF
        trainer.run()
        assert all(t.shape == size for t in (trainer.z, *trainer.moments)) and len(trainer.moments) == 2
        for name, parameter in editor.model.named_parameters():
            assert parameter.grad is None and parameter.requires_grad and torch.equal(parameter, before[name])

    def test_an_edit_alone_and_in_a_batch_start_with_the_same_gradient(self):
        editor = make_editor(optimizer="sgd", units="absolute", lr=0.5, margin_weight=0.0)
        steps = []
        for facts in (FACTS[:1], FACTS[1:2], FACTS[:2]):
            trainer = make_trainer(editor, facts)
            trainer.last_dropout = 1.0
            trainer._begin_anew(range(len(facts)))
            trainer._step(list(range(len(facts))), list(range(2 * len(facts))))
            steps.append(trainer.z)
        torch.testing.assert_close(steps[0] + steps[1], steps[2], rtol=1e-3, atol=1e-5)


class TestLearningRate:
    @pytest.mark.parametrize("scale", [0.125, 8.0])
    def test_relative_units_do_not_depend_on_the_projections_scale(self, scale):
        """With a main memory of another size, margins and steps are the same multiples of it."""
        one, other = make_editor(), make_editor()
        with torch.no_grad():
            other.projection.base_layer.weight.mul_(scale)
        assert other.unit == pytest.approx(scale * one.unit, rel=0.1)  # the model writes other texts now
        lr = [make_trainer(editor, FACTS[:1]).lr for editor in (one, other)]
        assert lr[1] == pytest.approx(scale * lr[0], rel=0.2)

    @pytest.mark.parametrize("family", ["mistral", "gemma3"])
    def test_the_unit_is_the_main_responses_norm_also_where_the_layer_normalises_it(self, family):
        editor, norms = make_editor(family=family), []
        texts = editor._samples[editor.config.prefixes :][:4]
        hook = editor.projection.register_forward_hook(lambda _m, _a, y: norms.append(y[0].norm(dim=-1)))
        logits(editor.model, texts)
        hook.remove()
        assert editor.unit == pytest.approx(float(torch.cat(norms).median()), rel=1e-4)

    def test_absolute_units_are_taken_as_they_are(self):
        editor = make_editor(units="absolute", lr=0.125)
        assert editor.unit == 1.0 and make_trainer(editor, FACTS[:1]).lr == 0.125


class TestDrawing:
    def test_steps_take_turns_between_the_bare_prompts_kind_and_the_longer_one(self):
        trainer = make_trainer(make_editor(prefixes=5, dropped=2, prefixes_per_step=2), FACTS)
        standing = trainer.standing
        assert trainer.rows.kinds == [[0, 6, 7], [1, 2, 3, 4, 5]]
        for step in range(1, 9):
            standing.steps = [step - 1] * len(FACTS)
            rows = standing.draw([0, 2])
            if step % 2:
                short = [n for n in trainer.rows.numbers([0, 2]) if n % 8 in (0, 6, 7)]
                assert sorted(rows) == short and rows[0] == 0 and 16 in rows
            else:
                assert {row // 8 for row in rows[:2]} == {0} and {row // 8 for row in rows[2:]} == {2}
                assert len(set(rows)) == 4 and all(0 < row % 8 < 6 for row in rows)

    def test_a_kind_that_is_fine_leaves_its_turn_to_one_that_is_not(self):
        trainer = make_trainer(make_editor(prefixes=5, dropped=2, prefixes_per_step=2), FACTS[:1])
        standing = trainer.standing
        standing.held, standing.nll = [True] * 8, [0.0] * 8
        for standing.steps in ([0], [1]):
            standing.nll[5] = 2 * trainer.config.nll
            assert all(0 < row < 6 for row in standing.draw([0]))
            standing.nll[5], standing.held[0] = 0.0, False
            assert 0 in standing.draw([0])
            standing.held[0] = True
            assert (0 in standing.draw([0])) == (standing.steps == [0])

    def test_what_did_not_hold_comes_first_and_then_what_was_seen_longest_ago(self):
        trainer = make_trainer(make_editor(prefixes=5, prefixes_per_step=2), FACTS[:1])
        standing = trainer.standing
        standing.held, standing.seen = [True, True, False, True, True, True], [0, 1, 5, 3, 2, 4]
        standing.steps = [1]
        assert standing.draw([0]) == [2, 1]

    @pytest.mark.parametrize("prefixes, drawn", [(0, [0]), (1, [0, 1])])
    def test_fewer_than_wanted(self, prefixes, drawn):
        trainer = make_trainer(make_editor(prefixes=prefixes, prefixes_per_step=3), FACTS[:1])
        standing = trainer.standing
        for standing.steps in ([0], [1]):
            assert standing.draw([0]) == drawn


class TestSettling:
    def watched(self, monkeypatch):
        """What is settled, in order, and the trainers that did it."""
        settle, settled, run, trainers = Trainer._settle, [], Trainer.run, []

        def settling(self, edits, *active):
            settled.append(list(edits))
            settle(self, edits, *active)

        monkeypatch.setattr(Trainer, "_settle", settling)
        monkeypatch.setattr(Trainer, "run", lambda self: trainers.append(self) or run(self))
        return settled, trainers

    @pytest.mark.parametrize("wave", [1, 2, 3])
    def test_few_are_trained_at_once_and_each_is_settled_once(self, wave, monkeypatch):
        settled, trainers = self.watched(monkeypatch)
        step, shown = Trainer._step, []
        monkeypatch.setattr(
            Trainer, "_step", lambda self, active, rows: shown.append(active) or step(self, active, rows)
        )
        reports = make_editor(wave=wave).edit(FACTS)
        assert shown[0] == list(range(wave)) and max(map(len, shown)) == wave
        assert sorted(sum(settled, [])) == [0, 1, 2, 3] and all(settled)
        assert all(r.success for r in reports)
        assert [sum(edit in active for active in shown) for edit in range(4)] == [r.steps for r in reports]
        (trainer,) = trainers
        assert sorted(trainer.absorbed) == [0, 1, 2, 3]

    def test_a_straggler_does_not_undo_the_rest_of_its_batch(self, monkeypatch):
        """One edit that never claims to hold takes all steps; the others are settled before, and keep what they had."""
        claims = Standing.claims
        monkeypatch.setattr(Standing, "claims", lambda self, edit, *slack: edit != 3 and claims(self, edit, *slack))
        editor = make_editor(max_steps=30)
        reports = editor.edit(FACTS)
        assert reports[3].steps == 30 and not reports[3].success
        assert all(r.success and r.steps < 30 for r in reports[:3])
        assert evaluate(editor, FACTS[:3]).summary()["reliability"] == 1.0

    def test_what_the_rest_of_the_batch_undid_is_trained_again(self, monkeypatch):
        """An edit that is found not to hold at the end is released, trained again and settled again."""
        settled, trainers = self.watched(monkeypatch)
        verify, found = Trainer._verify, []

        def verified(self):
            means, fine = verify(self)
            found.append(list(fine))
            return means, ([False, *fine[1:]] if len(found) == 1 else fine)

        monkeypatch.setattr(Trainer, "_verify", verified)
        reports = make_editor().edit(FACTS)
        assert len(found) == 2 and all(found[1]) and all(r.success for r in reports)
        assert [edits for edits in settled if edits][-1] == [0] and sum(settled, []).count(0) == 2
        assert sorted(trainers[0].absorbed) == [0, 1, 2, 3]

    def test_releasing_leaves_what_the_other_settled_edits_put_into_p(self):
        editor = make_editor(FACTS[:1])
        shard = editor._state.shard
        trainer = make_trainer(editor, FACTS[1:3], shard.memory.values, shard.p)
        trainer._begin_anew([0, 1])
        trainer._settle([0], [1])
        trainer._settle([1])
        after = trainer.p
        torch.testing.assert_close(trainer.quiet.features, trainer.quiet.selected @ after, rtol=1e-3, atol=1e-4)
        kept = trainer.absorbed[1].double()
        trainer._release([0])
        expected = torch.linalg.inv(torch.linalg.inv(shard.p.double()) + kept.t() @ kept).float()
        assert (after - trainer.p).norm() > 0.02 * after.norm() and list(trainer.absorbed) == [1]
        torch.testing.assert_close(trainer.p, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(trainer.quiet.features, trainer.quiet.selected @ trainer.p)
        trainer._release([1])
        assert torch.equal(trainer.p, shard.p) and not trainer.absorbed

    def test_what_goes_on_is_protected_from_what_is_settled(self):
        trainer = make_trainer(make_editor(), FACTS[:2], p=torch.eye(round(0.6 * D_FF)))
        trainer._begin_anew([0, 1])
        trainer.z += 0.1 * torch.randn(trainer.z.shape, generator=torch.Generator().manual_seed(3))
        trainer._settle([0], [1])
        assert torch.equal(trainer.origin, torch.eye(len(trainer.p)))
        for group, places in trainer.rows.split(trainer.rows.numbers([1])):
            tokens = group.tokens(places)
            selected = group.selected[tokens]
            torch.testing.assert_close(group.features[tokens], selected @ trainer.p, rtol=1e-3, atol=1e-4)
            expected = trainer.memory.respond(selected)
            torch.testing.assert_close(group.before[tokens], expected, rtol=1e-3, atol=1e-4)

    def test_without_protection_a_batch_ends_together(self, monkeypatch):
        """Nothing is called fitted that later steps of its batch have undone."""
        settled, trainers = self.watched(monkeypatch)
        editor = make_editor(protect=False, max_steps=40)
        reports = editor.edit([*FACTS[:3], Edit("Who leads Fry?", "9{}~zqk 0w")])
        assert sorted(settled[0]) == [0, 1, 2, 3]
        (trainer,) = trainers
        nll, fine = trainer._verify()
        assert fine == [r.success for r in reports] and nll == pytest.approx([r.loss for r in reports], rel=1e-3)


class TestStopping:
    def test_success_needs_the_margin_too(self):
        (report,) = make_editor(beta=1e4, margin_weight=1e-6).edit(FACTS[0])
        assert report.loss < QUICK.nll and not report.success and report.steps == QUICK.max_steps

    def test_min_steps(self):
        editor = make_editor([FACTS[0]])
        editor.config = QUICK.replace(min_steps=9)
        assert editor.edit(FACTS[0])[0].steps >= 9

    def test_the_reported_loss_is_what_the_served_model_has(self):
        editor = make_editor(FACTS[:2], first_token=3.0, last_ratio=None)
        editor.projection.thresholds.zero_()  # prefixed prompts may lie out of scope
        for fact, report in zip(FACTS, editor.edits, strict=False):
            losses = []
            for row in editor.examples([fact], [0])[0]:
                ids = torch.tensor([[*row.prompt, *row.target[:-1]]])
                with torch.no_grad():
                    found = editor.model(ids).logits[0, len(row.prompt) - 1 :]
                losses.append(float(weighted_nll(editor.config, found, row.target)))
            assert report.loss == pytest.approx(sum(losses) / len(losses), rel=1e-3)
            assert report.success

    def test_a_large_vocabulary_is_trained_in_part_and_judged_as_a_whole(self, monkeypatch):
        whole = Likely.of
        monkeypatch.setattr(training, "WHOLE_VOCABULARY", 16)
        monkeypatch.setattr(Likely, "of", classmethod(lambda cls, *given: whole(*given, 6)))
        seen, replay = [], type(make_editor().tail).replay_all

        def watched(self, parts, head=None):
            seen.append(260 if head is None else len(head[0]))
            return replay(self, parts, head)

        monkeypatch.setattr("wise_fast.tail.Tail.replay_all", watched)
        editor = make_editor(FACTS)
        assert min(seen) < 150 and 260 in seen
        assert all(r.success for r in editor.edits)
        assert evaluate(editor).summary()["exact"] == 1.0


class TestQuietTexts:
    def test_padding_and_specials_are_no_text(self):
        editor = make_editor()
        texts = editor._texts({"a": 1.0, "abcd": 2.0})
        assert texts.names == ("a", "abcd") and texts.limit.tolist() == [1.0, 2.0]
        assert texts.text.tolist() == [0] * 2 + [1] * 5 and texts.a.shape == (7, D_FF)  # with BOS

    def test_the_models_own_texts_stay_quiet(self):
        editor = make_editor(FACTS)
        trainer = make_trainer(editor, FACTS[:1])
        with torch.no_grad():
            response = editor.memories[0].respond(editor.memories[0].select(trainer.quiet.texts.a))
            score = trainer.quiet.scores(response, torch.arange(len(response)))
        assert float(score.max()) <= 2 * QUICK.alpha * editor.unit  # what an edit must reach before it may stop
        assert float(score.max()) < editor.memories[0].threshold

    def test_an_irrelevant_text_is_pushed_out_of_scope(self):
        near = FACTS[0].prompt.replace("?", "!")
        found = []
        for irrelevant in (None, near):
            editor = make_editor([Edit(FACTS[0].prompt, FACTS[0].target, irrelevant=irrelevant)], last_ratio=None)
            logits(editor.model, [near])
            found.append((float(editor.routing.scores), int(editor.routing.choice), editor.edits[0].success))
        assert found[0][1:] == (0, True) and found[1][1:] == (-1, True)
        assert found[1][0] < 0.7 * found[0][0]
