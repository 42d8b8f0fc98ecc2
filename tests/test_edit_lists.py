"""Lists of edits: what counts as one, and which of two for the same prompt."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tests.edit_files import MEND, REQUEST, fails
from wise_fast.data import Edit, Superseded, as_edits, deduplicate


def test_as_edits():
    edit = Edit("a", "b")
    assert as_edits(edit) == as_edits({"prompt": "a", "target": "b"}) == [edit]
    assert as_edits([]) == []
    assert as_edits(item for item in [edit, REQUEST, MEND]) == [edit, edit, edit]
    fails(lambda: as_edits([edit, {"prompt": "a", "target": ""}]), "edit 2: ", "field 'target'")
    fails(lambda: as_edits([edit, None]), "edit 2: ", "null")
    for wrong in ("edits.json", Path("edits.json"), 3, None):
        fails(lambda wrong=wrong: as_edits(wrong), "expected Edit, dict, or a list", "load_edits")


few_prompts = st.sampled_from(["a b", " a  b", "a\nb\t", "A b", "c"])
colliding = st.lists(st.builds(Edit, prompt=few_prompts, target=st.sampled_from(["x", " x ", "y"])), max_size=8)


@given(colliding)
def test_deduplicate(given_edits):
    kept, superseded = deduplicate(given_edits)
    folded = [" ".join(edit.prompt.split()) for edit in given_edits]
    winners = [i for i, prompt in enumerate(folded) if prompt not in folded[i + 1 :]]
    assert kept == [given_edits[i] for i in winners]
    assert [s.position for s in superseded] == [i for i in range(len(given_edits)) if i not in winners]
    for lost in superseded:
        winner = given_edits[lost.by_position]
        assert lost.by_position in winners and lost.position < lost.by_position
        assert lost.edit is given_edits[lost.position]
        assert folded[lost.by_position] == folded[lost.position]
        assert lost.contradicting == (lost.edit.target.strip() != winner.target.strip())
    assert deduplicate(kept) == (kept, [])


def test_deduplicate_names_the_last_edit_as_winner():
    first, second, third = Edit("a b", "x"), Edit("a  b", "y"), Edit(" a b", "x")
    kept, superseded = deduplicate(iter([first, second, third]))
    assert kept == [third]
    assert superseded == [Superseded(0, first, 2, False), Superseded(1, second, 2, True)]
