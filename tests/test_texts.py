"""Texts that edits leave quiet: putting sets of them together, taking some out, and which ones a batch is given."""

import torch

from tests.edited import FACTS, make_editor
from wise_fast import Edit
from wise_fast.texts import Texts


def make_texts(*lengths, start=0):
    """Texts of so many tokens, each token's activation being its text's number."""
    numbers = torch.tensor([start + i for i, length in enumerate(lengths) for _ in range(length)])
    names = tuple(f"text {start + i}" for i in range(len(lengths)))
    limits = torch.tensor([1.0 + start + i for i in range(len(lengths))])
    return Texts(names, numbers[:, None].float().expand(-1, 2), numbers - start, limits)


def check(texts, expected):
    """That these are the texts with these numbers and lengths, in order."""
    assert texts.names == tuple(f"text {i}" for i, _ in expected)
    assert texts.limit.tolist() == [1.0 + i for i, _ in expected]
    assert texts.text.tolist() == [n for n, (_, length) in enumerate(expected) for _ in range(length)]
    assert texts.a[:, 0].tolist() == [i for i, length in expected for _ in range(length)]


def test_join():
    check(make_texts(2, 1).join(make_texts(3, 1, start=2)), [(0, 2), (1, 1), (2, 3), (3, 1)])


def test_only():
    texts = make_texts(2, 1, 3)
    check(texts.only([0, 2]), [(0, 2), (2, 3)])
    check(texts.only([0, 1, 2]), [(0, 2), (1, 1), (2, 3)])
    check(texts.only([]), [])
    check(texts.only([]).join(texts.only([1])), [(1, 1)])


class TestOfABatch:
    EDIT = Edit("Who is the head of Fro?", "Ann", subject="Fro")

    def test_without_any(self):
        assert make_editor().quiet_texts(FACTS, None) is None

    def test_irrelevant_texts_and_neighbours_have_their_limits(self):
        editor = make_editor(near=3, near_limit=1.5)
        texts = editor.quiet_texts([Edit(self.EDIT.prompt, "Ann", subject="Fro", irrelevant="0 + 7")], None)
        assert texts.names[0] == "0 + 7" and texts.limit.tolist() == [1.0, 1.5, 1.5, 1.5]
        assert len(set(texts.names)) == 4
        for name in texts.names[1:]:
            assert name.startswith("Who is the head of ") and name.endswith("?") and "Fro" not in name

    def test_what_is_edited_is_never_kept_quiet(self):
        editor = make_editor(near=2)
        (first, second) = editor.quiet_texts([self.EDIT], None).names
        others = [Edit(first, "Bo"), self.EDIT]
        assert first not in editor.quiet_texts(others, None).names
        editor.edit(Edit(second, "Bo"))
        assert second not in editor.quiet_texts([self.EDIT], None).names

    def test_those_of_earlier_edits_in_the_shard_are_kept_with_them(self):
        editor = make_editor([self.EDIT], near=2)
        names = editor._state.shard.quiet.names
        editor.edit(FACTS[1])
        assert editor._state.shard.quiet.names[: len(names)] == names
        editor.edit(Edit(names[0], "Bo"))
        assert names[0] not in editor._state.shard.quiet.names and names[1] in editor._state.shard.quiet.names

    def test_neighbours_stay_out_of_scope(self):
        editor = make_editor([self.EDIT], near=4, near_limit=1.0, max_steps=120)
        memory, quiet = editor.memories[0], editor._state.shard.quiet
        norms = memory.respond(memory.select(quiet.a)).norm(dim=-1)
        scores = [float(norms[quiet.text == i].mean()) for i in range(len(quiet.names))]
        assert max(scores) < memory.threshold
