"""Sentences about two people, or two events, in which the order of the words decides."""

import dataclasses
import functools
from collections.abc import Callable

from pals_jax.data.demo import lexicon
from pals_jax.data.demo.grammar import Draw, draw_event, say_clause, sentence
from pals_jax.data.demo.words import COMPARISONS, GIFTS, GIVING, MEETING, THANKING

PEOPLE = sorted(
    {
        person
        for domain in lexicon.DOMAINS
        for person in domain.people
        if {"old", "tall"} & set(lexicon.adjectives(person))
    }
)


@dataclasses.dataclass(frozen=True)
class Relation:
    """A sentence, and others that stand to it in a known relation.

    Attributes:
        text: the sentence.
        same: another that says the same.
        unknown: one that it neither implies nor excludes.
        excluded: one that cannot be true of the same situation.
    """

    text: str
    same: str
    unknown: str
    excluded: str


def draw_relation(draw: Draw, split: str) -> Relation:
    """One of the kinds below, as whole sentences."""
    kinds: tuple[Callable[[Draw], Relation], ...] = (
        _thanking,
        _meeting,
        _giving,
        _comparison,
        functools.partial(_order, split=split),
    )
    relation = draw.one(kinds)(draw)
    return Relation(*(sentence(text) for text in dataclasses.astuple(relation)))


def _thanking(draw: Draw) -> Relation:
    """Whoever thanks somebody need not be thanked by them."""
    one, two = draw.several(PEOPLE, 2)
    verbs = draw.one(THANKING)
    verb = verbs[0]
    said = [f"the {two} was {draw.one(verbs)} by the {one}"]
    said += [f"the {one} {synonym} the {two}" for synonym in verbs[1:]]
    return Relation(
        f"the {one} {verb} the {two}",
        draw.one(said),
        draw.one((f"the {two} {verb} the {one}", f"the {one} was {verb} by the {two}")),
        draw.one((f"the {two} was not {verb} by the {one}", f"the {one} {verb} nobody")),
    )


def _meeting(draw: Draw) -> Relation:
    """Whoever argues with somebody is argued with by them."""
    one, two, three = draw.several(PEOPLE, 3)
    verbs = draw.one(MEETING)
    verb, other = verbs[0], draw.one(verbs)
    return Relation(
        f"the {one} {verb} the {two}",
        f"the {two} {other} the {one}",
        draw.one((f"the {two} {other} the {three}", f"the {three} {other} the {one}")),
        draw.one((f"the {two} never {other} the {one}", f"the {one} never {other} the {two}")),
    )


def _giving(draw: Draw) -> Relation:
    """What one sells to another, the other buys from the one."""
    one, two = draw.several(PEOPLE, 2)
    give, get = draw.one(GIVING)
    gift = draw.one(GIFTS)
    there, back = f"{give} the {gift} to", f"{get} the {gift} from"
    quality = draw.one(lexicon.adjectives(gift) or ("broken",))
    sentences = [f"the {one} {there} the {two}", f"the {two} {back} the {one}"]
    text, same = draw.several(sentences, 2)
    return Relation(
        text,
        same,
        same.replace(f"the {gift}", f"the {quality} {gift}"),
        draw.one((f"the {two} {there} the {one}", f"the {one} {back} the {two}")),
    )


def _comparison(draw: Draw) -> Relation:
    """Whoever is taller than somebody has somebody shorter beside them."""
    one, two, three = draw.several(PEOPLE, 3)
    more, less = draw.several(draw.one(COMPARISONS), 2)
    return Relation(
        f"the {one} was {more} the {two}",
        f"the {two} was {less} the {one}",
        draw.one((f"the {two} was {less} the {three}", f"the {one} was {more} the {three}")),
        draw.one((f"the {two} was {more} the {one}", f"the {one} was {less} the {two}")),
    )


def _order(draw: Draw, split: str) -> Relation:
    """One thing before another is the other after the one."""
    domain = draw.one(lexicon.DOMAINS)
    clauses: list[str] = []
    while len(clauses) < 3:
        clause = say_clause(draw_event(draw, split, 0.0, domain))
        clauses += [clause] * (clause not in clauses)
    one, two, three = clauses
    text, same = draw.several((f"{one} before {two}", f"{two} after {one}"), 2)
    return Relation(
        text,
        same,
        draw.one((f"{one} before {three}", f"{two} after {three}")),
        draw.one((f"{two} before {one}", f"{one} after {two}")),
    )
