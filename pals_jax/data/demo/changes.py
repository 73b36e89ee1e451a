"""Changes of one part of an event; each gives None where the event has no such part."""

import dataclasses
from collections.abc import Callable

from pals_jax.data.demo import lexicon
from pals_jax.data.demo.grammar import Draw, Event
from pals_jax.data.demo.words import TIMES

Change = Callable[[Draw, Event], Event | None]


def negate(draw: Draw, event: Event) -> Event:
    """That it did not happen: "no cook", "did not fry any vegetables", "did not fry the egg"."""
    if event.negated:
        return dataclasses.replace(event, negated=False)
    if event.subject.determiner == "a":
        return event.with_subject(determiner="no")
    if event.object.determiner == "a":
        event = event.with_object(determiner="any")
    return dataclasses.replace(event, negated=True)


def opposite(draw: Draw, event: Event) -> Event | None:
    """The opposite verb."""
    opposites = event.action.opposites
    if not opposites:
        return None
    verb = event.action.verb if event.verb in opposites else opposites[0]
    return dataclasses.replace(event, verb=verb)


def other_quality(draw: Draw, event: Event) -> Event | None:
    """A quality of the object, or the subject, which excludes the one it has."""
    if event.object.adjective:
        others = lexicon.exclusive_adjectives(event.object.noun, event.object.adjective)
        return event.with_object(adjective=draw.one(others))
    if event.subject.adjective:
        others = lexicon.exclusive_adjectives(event.subject.noun, event.subject.adjective)
        return event.with_subject(adjective=draw.one(others))
    return None


def other_place(draw: Draw, event: Event) -> Event | None:
    """Another place."""
    if not event.place:
        return None
    places = [place for place in event.domain.places if place != event.place]
    return dataclasses.replace(event, place=draw.one(places))


def other_time(draw: Draw, event: Event) -> Event | None:
    """A time that excludes the one it has."""
    for group in TIMES:
        if event.time in group:
            others = [time for time in group if time != event.time]
            return dataclasses.replace(event, time=draw.one(others))
    return None


def other_subject(draw: Draw, event: Event) -> Event:
    """Somebody else of the domain."""
    people = [person for person in event.domain.people if person != event.subject.noun]
    noun = draw.one(people)
    fits = event.subject.adjective in lexicon.adjectives(noun)
    return event.with_subject(noun=noun, adjective=event.subject.adjective if fits else "")


def other_object(draw: Draw, event: Event) -> Event | None:
    """Something else that this can be done to."""
    objects = [noun for noun in event.action.choices("train") if noun != event.object.noun]
    noun = draw.one(objects)
    fits = event.object.adjective in lexicon.adjectives(noun)
    return event.with_object(noun=noun) if fits or not event.object.adjective else None


def other_verb(draw: Draw, event: Event) -> Event | None:
    """Something else that can be done to the object, or the opposite."""
    noun = event.object.noun
    others = [
        action
        for action in event.domain.actions
        if noun in action.choices("train") and action.verb != event.verb
    ]
    if not others:
        return opposite(draw, event)
    action = draw.one(others)
    return dataclasses.replace(event, action=action, verb=action.verb)


def add_detail(draw: Draw, event: Event) -> Event | None:
    """One more detail: a quality, a place or a time."""
    details: list[Event] = []
    if not event.place:
        details.append(dataclasses.replace(event, place=draw.one(event.domain.places)))
    if not event.time:
        details.append(dataclasses.replace(event, time=draw.one(draw.one(TIMES))))
    if not event.object.adjective and lexicon.adjectives(event.object.noun):
        details.append(event.with_object(adjective=draw.one(lexicon.adjectives(event.object.noun))))
    return draw.one(details) if details else None


def drop_detail(draw: Draw, event: Event) -> Event | None:
    """One detail less."""
    details: list[Event] = []
    if event.place:
        details.append(dataclasses.replace(event, place=""))
    if event.time:
        details.append(dataclasses.replace(event, time=""))
    if event.object.adjective:
        details.append(event.with_object(adjective=""))
    return draw.one(details) if details else None
