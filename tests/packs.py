"""Saved packs of one tiny base model that answer the same prompts differently, and an editor that serves them."""

from pathlib import Path

from tests.edited import FACTS, QUICK, wide_model
from tests.tiny import tiny_tokenizer
from wise_fast import Edit, WiseEditor

ASKED, OTHER = FACTS[0], FACTS[1]  # facts that both packs have an answer to
LEGAL = (Edit(ASKED.prompt, "law"), Edit(OTHER.prompt, "act"))
MEDICAL = (Edit(ASKED.prompt, "leg"), Edit(OTHER.prompt, "arm"))
OWN = (ASKED, FACTS[2])
PROMPTS = (ASKED.prompt, OTHER.prompt, FACTS[2].prompt, "0 + 7")
NAMES = ("default", "legal", "medical", "__base__")
ROWS = [(prompt, name) for prompt in PROMPTS for name in NAMES]
FIXED = dict(do_sample=False, min_new_tokens=5, max_new_tokens=5, pad_token_id=258)


def new_editor(facts=(), family="mistral", **changes):
    editor = WiseEditor(wide_model(family), tiny_tokenizer(), QUICK.replace(**changes))
    if facts:
        editor.edit(facts)
    return editor


def save_packs(directory: Path, family="mistral", layout="neuron", medical="leverage") -> dict[str, Path]:
    """Directories of the two packs; `medical` is routed by leverage or by "score"."""
    for name, facts, changes in (
        ("legal", LEGAL, dict(shard_size=1)),  # two memories
        ("medical", MEDICAL, dict(route_by=medical)),
    ):
        new_editor(facts, family, layout=layout, **changes).save_pretrained(directory / name)
    return {name: directory / name for name in ("legal", "medical")}


def with_packs(saved, facts=OWN, family="mistral", **changes):
    editor = new_editor(facts, family, **changes)
    for name, directory in saved.items():
        editor.load_pack(directory, name)
    return editor


def generated(editor, prompts, settings=FIXED, **more):
    """[B, new] tokens of a batch."""
    given = editor.tokenizer(list(prompts), return_tensors="pt", padding=True)
    return editor.model.generate(**given, **(settings | more))[:, given["input_ids"].shape[1] :]
