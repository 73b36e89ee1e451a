"""Events and how they are said: the meaning in one place, its wording in another."""

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from pals_jax.data.demo import lexicon
from pals_jax.data.demo.lexicon import Action, Domain
from pals_jax.data.demo.words import TIMES

Item = TypeVar("Item")
_SINGULAR = ("the", "a", "no", "every")


class Draw:
    """Random choices that are a pure function of a key."""

    def __init__(self, *key: int):
        self._rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return bool(self._rng.random() < probability)

    def one(self, options: Sequence[Item]) -> Item:
        """One of the options."""
        return options[int(self._rng.random() * len(options))]

    def several(self, options: Sequence[Item], count: int) -> list[Item]:
        """Different ones of the options."""
        rest = list(options)
        return [rest.pop(int(self._rng.random() * len(rest))) for _ in range(count)]


@dataclasses.dataclass(frozen=True)
class NounPhrase:
    """A noun with its determiner ("the", "a", "no", "any", "two", "all of the") and adjective."""

    noun: str
    adjective: str = ""
    determiner: str = "the"

    @property
    def is_plural(self) -> bool:
        """Whether the noun stands in the plural."""
        return self.determiner not in _SINGULAR and lexicon.plural(self.noun) != self.noun

    def __str__(self) -> str:
        noun = self.noun if self.determiner in _SINGULAR else lexicon.plural(self.noun)
        phrase = f"{self.adjective} {noun}".strip()
        return (
            lexicon.with_article(phrase)
            if self.determiner == "a"
            else f"{self.determiner} {phrase}"
        )


@dataclasses.dataclass(frozen=True)
class Event:
    """Someone did, or did not do, something to something, somewhere at some time."""

    domain: Domain
    action: Action
    subject: NounPhrase
    verb: str
    object: NounPhrase
    place: str = ""
    time: str = ""
    negated: bool = False

    def with_subject(self, **changes: str) -> "Event":
        """The event with some of its subject's parts replaced."""
        return dataclasses.replace(self, subject=dataclasses.replace(self.subject, **changes))

    def with_object(self, **changes: str) -> "Event":
        """The event with some of its object's parts replaced."""
        return dataclasses.replace(self, object=dataclasses.replace(self.object, **changes))

    @property
    def parts(self) -> tuple[str, ...]:
        """The words for who, what was done, to what, of what quality, and where."""
        noun, adjective = self.object.noun, self.object.adjective
        return self.subject.noun, self.verb, noun, adjective, self.place

    @property
    def has_passive(self) -> bool:
        """Whether a passive sentence says it well."""
        said_of_each = self.subject.determiner in ("the", "a", "two", "three", "four", "five")
        return " " not in self.verb and said_of_each and self.object.determiner != "any"


@dataclasses.dataclass(frozen=True)
class Wording:
    """How a sentence says its event."""

    passive: bool = False
    time_first: bool = False
    place_first: bool = False


def draw_event(draw: Draw, split: str, detail: float = 0.5, domain: Domain | None = None) -> Event:
    """An event in the past tense.

    Each detail (adjectives, place, time) is given with a probability. Half of the events for dev
    join a verb to the object that is held out with it.
    """
    domain = domain or draw.one(lexicon.DOMAINS)
    action = draw.one(domain.actions)
    held_out = split == "dev" and draw.chance(0.5)
    noun = action.objects[-1] if held_out else draw.one(action.choices("train"))
    person = draw.one(domain.people)
    return Event(
        domain,
        action,
        NounPhrase(person, _adjective(draw, person, detail / 2)),
        draw.one((action.verb, *action.opposites[:1])),
        NounPhrase(noun, _adjective(draw, noun, detail)),
        draw.one(domain.places) if draw.chance(detail) else "",
        draw.one(draw.one(TIMES)) if draw.chance(detail / 2) else "",
    )


def _adjective(draw: Draw, noun: str, probability: float) -> str:
    adjectives = lexicon.adjectives(noun)
    return draw.one(adjectives) if adjectives and draw.chance(probability) else ""


def say(event: Event, wording: Wording) -> str:
    """The sentence."""
    adverbials = [text for text in (event.place, event.time) if text]
    first = event.time if wording.time_first else event.place if wording.place_first else ""
    last = [text for text in adverbials if text != first]
    opening = f"{first}, " if first else ""
    return sentence(f"{opening}{say_clause(event, wording.passive)} {' '.join(last)}")


def say_clause(event: Event, passive: bool = False) -> str:
    """Subject, verb and object."""
    if passive and event.has_passive:
        auxiliary = ("were" if event.object.is_plural else "was") + " not" * event.negated
        return f"{event.object} {auxiliary} {lexicon.past(event.verb, True)} by {event.subject}"
    verb = f"did not {event.verb}" if event.negated else lexicon.past(event.verb)
    return f"{event.subject} {verb} {event.object}"


def sentence(text: str) -> str:
    """The text with a capital and a full stop."""
    text = " ".join(text.split())
    return text[0].upper() + text[1:] + "."


def draw_wording(draw: Draw) -> Wording:
    """One of the ways to say an event."""
    return Wording(draw.chance(0.3), draw.chance(0.4), draw.chance(0.3))


def reword(draw: Draw, event: Event, rate: float) -> Event:
    """The same event with some words replaced by synonyms, each with a probability."""
    verb, action = event.verb, event.action
    synonyms = action.opposites if verb in action.opposites else action.synonyms
    if verb == action.implied:
        synonyms = ()
    return dataclasses.replace(
        event,
        subject=_reword_noun(draw, event.subject, rate),
        object=_reword_noun(draw, event.object, rate),
        verb=_replace(draw, verb, synonyms, rate),
        place=_replace(draw, event.place, lexicon.SYNONYMS.get(event.place, ()), rate),
    )


def _reword_noun(draw: Draw, phrase: NounPhrase, rate: float) -> NounPhrase:
    noun, adjective = phrase.noun, phrase.adjective
    other_words = lexicon.adjective_synonyms(noun, adjective)
    return NounPhrase(
        _replace(draw, noun, lexicon.SYNONYMS.get(noun, ()), rate),
        _replace(draw, adjective, other_words, rate),
        phrase.determiner,
    )


def _replace(draw: Draw, word: str, synonyms: Sequence[str], rate: float) -> str:
    others = [synonym for synonym in synonyms if synonym != word]
    return draw.one(others) if others and draw.chance(rate) else word
