"""Prompts and targets as token ids: where the one ends and the other begins, stop tokens, batches and masks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from tests.tiny import tiny_tokenizer
from wise_fast.errors import ConfigError, EditDataError
from wise_fast.tokens import Example, collate, encode, encode_target, pad_token, stop_token, to_left

BOS, EOS, PAD = 256, 257, 258
TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(str.strip)
ROWS = st.lists(
    st.builds(
        Example,
        st.lists(st.integers(0, 255), min_size=1, max_size=6).map(tuple),
        st.lists(st.integers(0, 255), max_size=5).map(tuple),
    ),
    min_size=1,
    max_size=5,
)


def closing(bos=True, eos=True):
    """A tokenizer that puts these around every text."""
    tokenizer = tiny_tokenizer(bos=False)
    template = " ".join((["<bos>"] if bos else []) + ["$A"] + (["<eos>"] if eos else []))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    return tokenizer


def text_of(tokenizer, ids):
    return tokenizer.decode(ids)


class TestEncode:
    @pytest.mark.parametrize("bos", [False, True])
    @pytest.mark.parametrize("eos", [False, True])
    def test_bos_stays_and_eos_goes(self, bos, eos):
        plain = tuple(tiny_tokenizer(bos=False)("Who?")["input_ids"])
        assert encode(closing(bos, eos), "Who?") == ((BOS,) if bos else ()) + plain

    @pytest.mark.parametrize("bos", [False, True])
    @pytest.mark.parametrize("eos", [False, True])
    def test_target_has_no_special_tokens(self, bos, eos):
        row = encode_target(closing(bos, eos), "Who?", "Ann")
        assert row.prompt == encode(closing(bos, eos), "Who?")
        assert row.target == tuple(tiny_tokenizer(bos=False)(" Ann")["input_ids"])

    @pytest.mark.parametrize(
        "prompt, target, joined",
        [
            ("Who?", "Ann", " Ann"),
            ("Who?", " Ann", " Ann"),
            ("Who? ", "Ann", "Ann"),
            ("Who?\n", "Ann", "Ann"),
            ("Who?", "\nAnn", "\nAnn"),
            ("Who?", "An\nn", " An\nn"),
            ("Who?", "Ann\n", " Ann\n"),
            ("Who? ", " Ann", " Ann"),
        ],
    )
    def test_a_space_joins_where_there_is_none(self, prompt, target, joined):
        tokenizer = tiny_tokenizer()
        row = encode_target(tokenizer, prompt, target)
        assert text_of(tokenizer, row.prompt[1:]) == prompt and text_of(tokenizer, row.target) == joined

    @given(prompt=TEXT, target=TEXT)
    def test_the_split_is_where_generating_starts(self, prompt, target):
        tokenizer = tiny_tokenizer()
        row = encode_target(tokenizer, prompt, target)
        assert row.prompt == tuple(tokenizer(prompt)["input_ids"])
        joint = "" if prompt[-1].isspace() or target[0].isspace() else " "
        assert text_of(tokenizer, row.target) == joint + target

    def test_a_boundary_inside_a_token(self):
        """Where the joint text merges over the boundary, the prompt is still what generating sees."""

        class Merging:
            eos_token_id = None

            def __call__(self, text, add_special_tokens=True):
                pieces = text.replace("? A", "#").split("#")
                ids = [ord(c) for c in "#".join(pieces)]
                return {"input_ids": ids}

        row = encode_target(Merging(), "Who?", "Ann")
        assert row.prompt == tuple(map(ord, "Who?")) and row.target == tuple(map(ord, " Ann"))

    @pytest.mark.parametrize("prompt, target, what", [("", "Ann", "prompt"), ("Who?", "", "target")])
    def test_nothing_left(self, prompt, target, what):
        with pytest.raises(EditDataError, match=f"the {what} '.*tokenizes to nothing"):
            encode_target(tiny_tokenizer(bos=False), prompt, target)


class TestStopToken:
    @pytest.mark.parametrize("kind, token", [("auto", EOS), ("eos", EOS), ("none", None), ("newline", "\n")])
    def test_kinds(self, kind, token):
        expected = tiny_tokenizer(bos=False)(token)["input_ids"][0] if token == "\n" else token
        assert stop_token(tiny_tokenizer(), kind) == expected

    def test_without_eos(self):
        tokenizer = tiny_tokenizer()
        tokenizer.eos_token = None
        assert stop_token(tokenizer, "auto") == stop_token(tokenizer, "newline") != EOS
        with pytest.raises(ConfigError, match="no EOS token"):
            stop_token(tokenizer, "eos")

    @pytest.mark.parametrize("ids", [[], [13, 10]])
    def test_a_newline_that_is_not_one_token(self, ids):
        class Odd:
            eos_token_id = None

            def __call__(self, text, add_special_tokens=True):
                return {"input_ids": ids}

        assert stop_token(Odd(), "auto") is None
        with pytest.raises(ConfigError, match=f"newline is {len(ids)} tokens"):
            stop_token(Odd(), "newline")


class TestPadToken:
    def test_pad_then_eos_then_anything(self):
        tokenizer = tiny_tokenizer()
        assert pad_token(tokenizer) == PAD
        tokenizer = tiny_tokenizer(pad=False)
        assert pad_token(tokenizer) == EOS
        tokenizer.eos_token = None
        assert pad_token(tokenizer) == 0


class TestCollate:
    def test_by_hand(self):
        batch = collate([Example((1, 2, 3), (4, 5)), Example((6,), ()), Example((7, 8), (9,))], 0, "cpu")
        assert batch.input_ids.tolist() == [[1, 2, 3, 4], [6, 0, 0, 0], [7, 8, 0, 0]]
        assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]
        assert batch.prompt_mask.int().tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]]
        assert batch.positions.tolist() == [2, 3, 9]
        assert batch.labels.tolist() == [4, 5, 9]
        assert batch.row.tolist() == [0, 0, 2]

    @given(rows=ROWS, pad=st.sampled_from([0, 258]))
    def test_every_label_follows_its_position(self, rows, pad):
        batch = collate(rows, pad, "cpu")
        assert batch.input_ids.shape == batch.attention_mask.shape == batch.prompt_mask.shape
        for i, row in enumerate(rows):
            ids = (*row.prompt, *row.target)
            seen = batch.attention_mask[i].bool()
            assert tuple(batch.input_ids[i][seen].tolist()) == (ids[:-1] if row.target else ids)
            assert seen.tolist() == sorted(seen.tolist(), reverse=True)
            assert (batch.input_ids[i][~seen] == pad).all()
            assert batch.prompt_mask[i].sum() == len(row.prompt) and (seen | ~batch.prompt_mask[i]).all()
            own = batch.row == i
            assert tuple(batch.labels[own].tolist()) == row.target
            first = i * batch.input_ids.shape[1]
            for n, place in enumerate((batch.positions[own] - first).tolist()):
                assert tuple(batch.input_ids[i, : place + 1].tolist()) == (*row.prompt, *row.target[:n])

    @given(rows=ROWS)
    def test_to_left(self, rows):
        batch = collate(rows, 0, "cpu")
        mask = to_left(batch.attention_mask, batch.attention_mask)
        ids = to_left(batch.input_ids, batch.attention_mask)
        assert torch.equal(mask, batch.attention_mask.flip(1))
        for i in range(len(rows)):
            seen = batch.attention_mask[i].bool()
            assert ids[i][mask[i].bool()].tolist() == batch.input_ids[i][seen].tolist()
