"""Tiny models that are wide enough to be taught, and settings under which they learn in a fraction of a second."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.tiny import FAMILIES, tiny_model, tiny_tokenizer
from wise_fast import Edit, WiseConfig, WiseEditor
from wise_fast.tokens import pad_token
from wise_fast.training import Trainer

WIDTH, D_FF = 128, 512
QUICK = WiseConfig(
    lr=4.0,
    alpha=0.5,
    beta=2.0,
    gamma=1.0,
    margin_weight=10.0,
    mask_ratio=0.6,
    prefixes=1,
    prefix_tokens=3,
    prefixes_per_step=1,
    dropped=0,
    near=0,
    nll=0.4,
    first_token=1.0,  # answers have a token or two
    z_ratio=0.44,  # texts of tiny models lie closer to each other
    max_steps=60,
    min_steps=2,
    act_ratio=0.8,
    batch_size=4,
    rehearsals=0,
    shard_fill=None,  # few columns hold few edits, and the tests say how many share a memory
)
FACTS = (
    Edit("Who leads Fro?", "Ann"),
    Edit("Capital of Zed:", "Bo"),
    Edit("The color is", "red"),
    Edit("My dog eats", "ham"),
)
ELSEWHERE = ("0 + 7", "~~~", "zyx WVU", "{}")
TEXTS = (*(fact.prompt for fact in FACTS), *ELSEWHERE)


def wide_model(family: str = "mistral", seed: int = 0, **overrides) -> nn.Module:
    """The tiny model of a family with room for a few facts: 4 times as wide as `tiny_model`'s."""
    given = FAMILIES[family][2]
    if "n_embd" in given:
        sizes = {"n_embd": WIDTH, "n_inner": D_FF}
    else:
        sizes = {"hidden_size": WIDTH, "ffn_dim" if "ffn_dim" in given else "intermediate_size": D_FF}
    if "head_dim" in given:
        sizes["head_dim"] = WIDTH // 4
    if "query_pre_attn_scalar" in given:
        sizes["query_pre_attn_scalar"] = WIDTH // 4
    if given.get("word_embed_proj_dim") == given.get("hidden_size"):
        sizes |= {"word_embed_proj_dim": WIDTH} if "word_embed_proj_dim" in given else {}
    # A narrow head needs larger weights, or no hidden state makes any token likely.
    narrow = given.get("word_embed_proj_dim", WIDTH) < given.get("hidden_size", 0)
    sizes["init_std" if "init_std" in given else "initializer_range"] = 0.3 if narrow else 0.1
    return tiny_model(family, seed, **(sizes | overrides))


def make_editor(facts=(), family: str = "mistral", **changes) -> WiseEditor:
    """An editor of a wide model under `QUICK` and changes, which has learned these facts."""
    editor = WiseEditor(wide_model(family), tiny_tokenizer(), QUICK.replace(**changes))
    if facts:
        editor.edit(facts)
    return editor


def saved_model(directory: Path, tokenizer=None) -> str:
    """A new directory with the wide model and its tokenizer, as `load_model` and the command line take it."""
    wide_model().save_pretrained(directory)
    (tiny_tokenizer() if tokenizer is None else tokenizer).save_pretrained(directory)
    return str(directory)


@torch.no_grad()
def logits(model: nn.Module, texts=TEXTS) -> list[Tensor]:
    """Of every text by itself."""
    tokenizer = tiny_tokenizer()
    return [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@contextmanager
def untouched(editor: WiseEditor) -> Iterator[None]:
    """Checks that what runs inside leaves the editor's state, every tensor of the model and its answers alone."""
    state, undo = editor._state, list(editor._undo)
    tensors = {name: tensor.clone() for name, tensor in editor.model.state_dict().items()}
    values = [memory.values.clone() for memory in editor.memories]
    answers, mode = logits(editor.model), editor.model.training
    yield
    assert editor._state is state and editor._undo == undo
    assert editor.model.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in editor.model.state_dict().items())
    assert same([memory.values for memory in editor.memories], values)
    assert same(logits(editor.model), answers) and editor.model.training == mode


def make_trainer(editor, facts, values=None, p=None):
    """A trainer as `edit` makes it, in a shard that may hold something."""
    memory = editor._open_shard(editor._state).shard.memory
    memory = memory if values is None else memory.replace(values=values)
    generator, pad = torch.Generator().manual_seed(0), pad_token(editor.tokenizer)
    rows, quiet = editor.examples(facts, range(len(facts))), editor._quiet_pool
    return Trainer(editor.tail, memory, p, rows, quiet, editor.config, editor.unit, generator, pad)


def read_plainly(editor, prompt, target=None):
    """(labels' log-probabilities, argmax hits) from one full forward of one text."""
    ids = editor.tokenizer(prompt)["input_ids"]
    first, routed = 1, len(ids)
    if target is not None:
        first = routed = len(ids)
        ids = editor.tokenizer(f"{prompt} {target}")["input_ids"]
    mask = torch.arange(len(ids))[None] < routed
    with torch.no_grad(), editor.routing.prompt(mask):
        logits = editor.model(torch.tensor([ids])).logits[0].double()
    logp = logits.log_softmax(-1)
    places = range(first, len(ids))
    return [float(logp[i - 1, ids[i]]) for i in places], [int(logits[i - 1].argmax()) == ids[i] for i in places]
