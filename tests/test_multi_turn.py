"""A chat's next turn on top of its cache is routed anew, by its tokens alone, and each row as it is by itself."""

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.routed import FIXED, NEW, PROMPTS, positions, world

REPLIES = ("And her?", "Say it again, please", "No", "zzz", "The other one then", "8 + 8")
ROWS = range(len(PROMPTS))
SAID = torch.tensor([[70, 71, 72]])  # what the model said between the two turns


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def at(request):
    made = world(request.param)
    scores = torch.cat([by_hand(made, [i])[2] for i in ROWS])
    high = scores.topk(3, 0).values  # now each memory is in scope for the second turn of two rows
    made.editor.projection.set_bank(replace(made.bank, thresholds=high[1:].mean(0)))
    yield made
    made.editor.projection.set_bank(made.bank)


def two_turns(at, rows):
    """Ids and mask of both turns of these rows, and where what the model said begins; each turn is padded on its left.

    A sliding window counts padding between the turns, edited or not, so there the second turns are of one length.
    """
    replies = REPLIES if at.family == "llama" else [text.ljust(20, "?") for text in REPLIES]
    first, second = (
        at.tokenizer([texts[i] for i in rows], return_tensors="pt", padding=True, add_special_tokens=special)
        for texts, special in ((PROMPTS, True), (replies, False))
    )
    said = SAID.expand(len(rows), -1)
    ids = torch.cat([first["input_ids"], said, second["input_ids"]], 1)
    mask = torch.cat([first["attention_mask"], torch.ones_like(said), second["attention_mask"]], 1)
    return ids, mask, first["input_ids"].shape[1]


@torch.no_grad()
def by_hand(at, rows, static=False):
    """Decisions of both turns, scores of the second, and what is decoded behind it, token by token."""
    ids, mask, start = two_turns(at, rows)
    cache = StaticCache(at.model.config, 128) if static else DynamicCache(config=at.model.config)
    choices = []

    def forward(begin, end):
        given = dict(input_ids=ids[:, begin:end], attention_mask=mask[:, :end])
        logits = at.model(**given, **positions(mask[:, :end], given["input_ids"]), past_key_values=cache).logits[:, -1]
        choices.append(at.editor.routing.choice.tolist())
        logits[:, 257] = -torch.inf  # EOS, as in FIXED
        return logits.argmax(-1, keepdim=True)

    for end in range(start, start + SAID.shape[1] + 1):
        forward(0 if end == start else end - 1, end)
    token = forward(end, ids.shape[1])
    scores, turn = at.editor.routing.scores, len(choices) - 1
    for _ in range(NEW):
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
        token = forward(ids.shape[1] - 1, ids.shape[1])
    assert all(c == choices[0] for c in choices[:turn]) and all(c == choices[turn] for c in choices[turn:])
    return choices[0], choices[turn], scores, ids[:, -NEW:]


def by_generate(at, rows):
    """Decisions of both turns, and what `generate` makes of the second on the cache of a `generate` before."""
    ids, mask, start = two_turns(at, rows)
    cache = DynamicCache(config=at.model.config)
    first = dict(attention_mask=mask[:, :start], min_new_tokens=2, max_new_tokens=2)
    at.model.generate(ids[:, :start], past_key_values=cache, **FIXED | first)
    before = cache.routing_choice.tolist()
    said = at.model.generate(ids[:, :start], **FIXED | first)[:, start:]
    ids = torch.cat([ids[:, :start], said, ids[:, start + 2 :]], 1)
    made = at.model.generate(ids, attention_mask=mask, past_key_values=cache, **FIXED)
    assert torch.equal(cache.routing_choice, at.editor.routing.choice)
    return before, at.editor.routing.choice.tolist(), made[:, ids.shape[1] :]


@pytest.fixture(scope="module")
def alone(at):
    return [by_hand(at, [i]) for i in ROWS]


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_rows_of_a_batch_as_alone(at, alone, static):
    first, second, scores, made = by_hand(at, ROWS, static)
    assert first == [row[0][0] for row in alone] and second == [row[1][0] for row in alone]
    assert {-1} < set(second) and first != second
    torch.testing.assert_close(scores, torch.cat([row[2] for row in alone]), rtol=1e-4, atol=1e-4)
    assert torch.equal(made, torch.cat([row[3] for row in alone]))


def test_generate_on_top_of_generate(at):
    alone = [by_generate(at, [i]) for i in ROWS]
    first, second, made = by_generate(at, ROWS)
    assert first == [row[0][0] for row in alone] and second == [row[1][0] for row in alone]
    assert {-1} < set(second) and first != second
    assert torch.equal(made, torch.cat([row[2] for row in alone]))


@torch.no_grad()
def test_the_decision_is_by_the_new_turns_tokens(at):
    """Scores are the mean response norm of these: neither what was said before nor padding counts."""
    seen, bank = [], at.editor.projection
    handle = bank.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    scores = by_hand(at, ROWS)[2]
    handle.remove()
    ids, mask, start = two_turns(at, ROWS)
    turn = mask[:, start + SAID.shape[1] :].float()
    a = seen[1 + SAID.shape[1]]
    for memory, (begin, end) in enumerate(zip(bank.bounds, bank.bounds[1:], strict=False)):
        norms = (a[..., bank.index[begin:end]] @ bank.values[begin:end]).norm(dim=-1)
        torch.testing.assert_close(scores[:, memory], (norms * turn).sum(1) / turn.sum(1), rtol=1e-4, atol=1e-4)
