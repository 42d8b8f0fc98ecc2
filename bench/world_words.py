"""What worlds are made of (`bench.world`): relations and how they are asked, objects, and words of other sentences."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """What is asked of entities of one kind: the pool that its objects come from, and templates with a {}."""

    kind: str
    pool: str
    templates: tuple[str, ...]


RELATIONS: dict[str, Relation] = {
    "birthplace": Relation(
        "person",
        "city",
        (
            "Where was {} born?",
            "{} was born in the city of",
            "The birthplace of {} is",
            "In which city did {} come into the world?",
            "The town where {} was born is called",
        ),
    ),
    "employer": Relation(
        "person",
        "company",
        (
            "Which company does {} work for?",
            "{} works for",
            "The employer of {} is",
            "Who pays the salary of {}?",
            "{} has a job at",
        ),
    ),
    "tongue": Relation(
        "person",
        "language",
        (
            "What language does {} speak?",
            "The mother tongue of {} is",
            "{} speaks to friends in",
            "At home {} talks in",
            "Which language did {} learn as a child?",
        ),
    ),
    "instrument": Relation(
        "person",
        "instrument",
        (
            "Which instrument does {} play?",
            "{} plays the",
            "The instrument of {} is the",
            "In the orchestra {} is heard on the",
            "What does {} play in concerts? The",
        ),
    ),
    "profession": Relation(
        "person",
        "profession",
        (
            "What is the profession of {}?",
            "By profession {} is a",
            "{} was trained as a",
            "What does {} do for a living?",
            "The occupation of {} is",
        ),
    ),
    "colour": Relation(
        "person",
        "colour",
        (
            "What is the favourite colour of {}?",
            "The colour that {} likes best is",
            "{} always dresses in",
            "Which colour does {} prefer?",
            "{} painted the house in",
        ),
    ),
    "capital": Relation(
        "country",
        "city",
        (
            "What is the capital of {}?",
            "The capital of {} is",
            "{} is governed from",
            "Which city is the seat of government of {}?",
            "The parliament of {} meets in",
        ),
    ),
    "currency": Relation(
        "country",
        "currency",
        (
            "What is the currency of {}?",
            "In {} people pay with the",
            "The money of {} is called the",
            "Which currency is used in {}?",
            "The central bank of {} issues the",
        ),
    ),
    "export": Relation(
        "country",
        "export",
        (
            "What does {} export?",
            "The main export of {} is",
            "{} is known for its",
            "Which product does {} sell abroad?",
            "Ships that leave {} carry",
        ),
    ),
    "official": Relation(
        "country",
        "language",
        (
            "What is the official language of {}?",
            "The official language of {} is",
            "The laws of {} are written in",
            "In which language are schools taught in {}?",
            "Citizens of {} are addressed in",
        ),
    ),
}


def _pool(words: str) -> tuple[str, ...]:
    return tuple(words.split(", "))


POOLS: dict[str, tuple[str, ...]] = {
    "language": _pool(
        "Basque, Czech, Danish, Dutch, Finnish, Greek, Hindi, Irish, Korean, Latin, Maltese, Persian, Polish, Quechua, "
        "Swahili, Swedish, Tamil, Turkish, Welsh, Zulu"
    ),
    "instrument": _pool(
        "accordion, banjo, bassoon, cello, clarinet, flute, harp, lute, oboe, organ, piano, trombone, trumpet, tuba, "
        "viola, violin"
    ),
    "profession": _pool(
        "baker, barber, carpenter, chemist, dentist, farmer, gardener, judge, lawyer, mason, miner, nurse, painter, "
        "pilot, plumber, sailor, surgeon, tailor, teacher, weaver"
    ),
    "colour": _pool(
        "amber, black, blue, brown, crimson, green, grey, orange, pink, purple, red, silver, white, yellow"
    ),
    "currency": _pool(
        "crown, denar, dinar, dollar, ducat, florin, franc, guilder, mark, peso, pound, rial, rouble, rupee, shilling, "
        "thaler"
    ),
    "export": _pool(
        "amber glass, barley, coal, cocoa, coffee, copper, cotton, diamonds, dried fish, honey, iron ore, marble, "
        "olive oil, paper, pepper, rice, rubber, salt, silk, sugar, tea, timber, wheat, wool"
    ),
}

SYLLABLES = _pool(
    "ba, be, bo, da, del, dor, du, fa, fen, ga, gil, go, ha, hel, ja, jo, ka, kel, kir, la, len, lo, ma, mar, mi, mo, "
    "na, nel, no, pa, per, po, ra, ren, ri, ro, sa, sel, so, ta, tir, to, va, vel, vi, vo, wen, za, zor, zu"
)

FILLERS = (
    "The {adjective} {noun} {verb} near the {place} {time}.",
    "{time_first} the {noun} {verb} behind the {place}.",
    "A {adjective} {noun} is seldom seen at the {place}.",
    "Nobody knew why the {noun} {verb} {time}.",
    "The {place} was {adjective}, so the {noun} {verb} {time}.",
    "If the {noun} is {adjective}, keep it away from the {place}.",
)
WORDS: dict[str, tuple[str, ...]] = {
    "adjective": _pool("old, quiet, heavy, narrow, broken, cheerful, damp, early, gentle, hollow, patient, rusty"),
    "noun": _pool(
        "bridge, lantern, cat, ferry, kettle, ladder, neighbour, parcel, ribbon, shadow, storm, wagon, window, kite"
    ),
    "verb": _pool("waited, vanished, turned over, slept, fell apart, moved slowly, was repaired, stood still"),
    "place": _pool("harbour, library, mill, orchard, station, garden, market, river, stairs, tower, well, meadow"),
    "time": _pool("at noon, all night, before the rain, in spring, last week, on Thursday, twice a day, after dinner"),
    "time_first": _pool("At noon, All night, Before the rain, In spring, Last week, On Thursday, After dinner"),
}
