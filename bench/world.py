"""A seeded world of entities and facts, small enough that a model of a few million parameters learns all of it.

Every fact (entity, relation, object) can be asked with each template of its relation. One template of every fact is
held out of the training texts, so that a model that answers it has understood the question and not learned a sentence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from bench.world_words import FILLERS, POOLS, RELATIONS, SYLLABLES, WORDS
from wise_fast.data import Edit, Locality
from wise_fast.errors import EditDataError

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
_ALPHABET = [chr(code) for code in range(33, 127)]


@dataclass(frozen=True)
class WorldSettings:
    """Size of a world: people and countries in it, texts without a fact, and the seed of all of it."""

    seed: int = 0
    people: int = 130
    countries: int = 70
    fillers: int = 1200
    vocabulary: int = 1536


@dataclass(frozen=True)
class Fact:
    """`object` is what `relation` (a key of `RELATIONS`) gives for `entity`."""

    entity: str
    relation: str
    object: str

    def prompt(self, template: int) -> str:
        """The question in the words of one template of the relation."""
        return RELATIONS[self.relation].templates[template].format(self.entity)

    @property
    def templates(self) -> range:
        return range(len(RELATIONS[self.relation].templates))


@dataclass(frozen=True)
class World:
    """Facts, which template of each is held out of training, objects by pool, and texts that state no fact."""

    settings: WorldSettings
    facts: tuple[Fact, ...]
    held_out: tuple[int, ...]
    pools: dict[str, tuple[str, ...]]
    fillers: tuple[str, ...]

    def questions(self, held_out: bool) -> Iterator[tuple[str, str]]:
        """(prompt, answer) of every fact in the template that is held out, or in all the others."""
        for fact, out in zip(self.facts, self.held_out):
            for template in fact.templates:
                if (template == out) == held_out:
                    yield fact.prompt(template), fact.object

    def digest(self) -> str:
        """A hash of everything a model can learn from this world."""
        content = [asdict(self.settings), [asdict(fact) for fact in self.facts], self.held_out, self.fillers]
        content.append({name: relation.templates for name, relation in RELATIONS.items()})
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def make_world(settings: WorldSettings | None = None) -> World:
    """The world of these settings: the same settings make the same world."""
    settings = WorldSettings() if settings is None else settings
    draw = _Draw(settings.seed, "world")
    taken: set[str] = set()
    invented = {name: tuple(draw.word(taken) for _ in range(size)) for name, size in (("city", 40), ("company", 24))}
    pools = POOLS | invented
    entities = {"person": _people(settings.people, draw, taken), "country": _countries(settings.countries, draw, taken)}
    facts = tuple(
        Fact(entity, name, draw.one(pools[relation.pool]))
        for name, relation in RELATIONS.items()
        for entity in entities[relation.kind]
    )
    held_out = tuple(draw.number(len(fact.templates)) for fact in facts)
    return World(settings, facts, held_out, pools, tuple(_filler(draw) for _ in range(settings.fillers)))


class _Draw:
    """Choices from a seeded generator."""

    def __init__(self, *seed):
        number = int.from_bytes(hashlib.sha256(repr(seed).encode()).digest()[:8], "big") >> 1
        self.generator = torch.Generator().manual_seed(number)

    def number(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self.generator))

    def one(self, items: Sequence):
        return items[self.number(len(items))]

    def shuffled(self, items: Sequence) -> list:
        return [items[i] for i in torch.randperm(len(items), generator=self.generator).tolist()]

    def word(self, taken: set[str]) -> str:
        """A new capitalised word of two or three syllables."""
        while True:
            word = "".join(self.one(SYLLABLES) for _ in range(2 + self.number(2))).capitalize()
            if word not in taken:
                taken.add(word)
                return word


def _people(count: int, draw: _Draw, taken: set[str]) -> list[str]:
    """Names of one to three words out of few first and last names, so that people share parts of their names."""
    first, last = ([draw.word(taken) for _ in range(size)] for size in (24, 32))
    names: dict[str, None] = {}
    while len(names) < count:
        kind = draw.number(10)
        parts = [draw.one(first), draw.one(last)] if kind < 7 else [draw.one(first), draw.one(first), draw.one(last)]
        names[" ".join(parts) if kind < 9 else draw.word(taken)] = None
    return list(names)


def _countries(count: int, draw: _Draw, taken: set[str]) -> list[str]:
    """One word, or one shared by several countries behind a point of the compass."""
    shared = [draw.word(taken) for _ in range(12)]
    names: dict[str, None] = {}
    while len(names) < count:
        compass = draw.one(("North", "South", "East", "West", "New", "Upper"))
        names[f"{compass} {draw.one(shared)}" if draw.number(2) else draw.word(taken)] = None
    return list(names)


def _filler(draw: _Draw) -> str:
    """A sentence without a fact; one in four has a word that occurs nowhere else."""
    parts = {kind: draw.one(words) for kind, words in WORDS.items()}
    if not draw.number(4):
        parts["noun"] = draw.word(set())
    return draw.one(FILLERS).format(**parts)


def make_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """A BPE tokenizer of this world's texts: BOS in front of any text, words with their leading space, ASCII only."""
    texts = [f"{prompt} {answer}" for out in (False, True) for prompt, answer in world.questions(out)]
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    punctuation = pre_tokenizers.Split(Regex(r"[.,?!]"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="always"), punctuation])
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=world.settings.vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=_ALPHABET,
        min_frequency=2,
        show_progress=False,
    )
    backend.train_from_iterator([*texts, *world.fillers], trainer)
    bos = SPECIAL.index("<bos>")
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def make_edits(world: World, count: int, seed: int = 0, known: Collection[str] | None = None) -> list[Edit]:
    """Counterfactual edits of `count` facts: another object of the same pool, asked by one template, others rephrase.

    Args:
        known: prompts that the model answers rightly; edits and locality are taken from these. None: all are.

    Each edit has two locality prompts, of facts that none of these edits changes and of other entities: the first asks
    the same relation, the second another one.

    Raises:
        EditDataError: there are not so many facts to edit.
    """
    draw = _Draw(seed, "edits")
    order = draw.shuffled([fact for fact in world.facts if _asked(fact, known)])
    if count >= len(order):
        raise EditDataError(f"{count} edits wanted, but the model knows {len(order)} facts; make a larger world")
    edited, kept = order[:count], order[count:]
    edits = []
    for number, fact in enumerate(edited):
        first, *others = draw.shuffled(_asked(fact, known)) + [
            t for t in fact.templates if t not in _asked(fact, known)
        ]
        target = draw.one([other for other in world.pools[RELATIONS[fact.relation].pool] if other != fact.object])
        edits.append(
            Edit(
                prompt=fact.prompt(first),
                target=target,
                subject=fact.entity,
                rephrases=tuple(fact.prompt(template) for template in others),
                locality=tuple(_place(fact, kept, same, draw, known) for same in (True, False)),
                irrelevant=_filler(draw),
                id=f"{number}: {fact.relation}",
                truth=fact.object,
            )
        )
    return edits


def _asked(fact: Fact, known: Collection[str] | None) -> list[int]:
    return [template for template in fact.templates if known is None or fact.prompt(template) in known]


def _place(fact: Fact, kept: Sequence[Fact], same: bool, draw: _Draw, known) -> Locality:
    """A known prompt of a fact that stays as it is, of another entity and of the same or another relation."""
    places = [o for o in kept if o.entity != fact.entity and (o.relation == fact.relation) == same]
    if not places:
        raise EditDataError("no unedited fact is left to ask for locality; make a larger world or fewer edits")
    other = draw.one(places)
    return Locality(other.prompt(draw.one(_asked(other, known))), other.object)
