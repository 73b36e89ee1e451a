"""The task `similarity`: how close are the meanings of two sentences, from 0 to 5?

The rule: each of the five roles (subject, verb, object, quality of the object, place) that either
sentence fills scores 1 for the same word in both, 0.8 for synonyms, 0.4 for words of one class (two
vegetables, two colours, a verb and its opposite), else 0. The score is five times the mean, to one
decimal. The voice, the order of the words and the time do not count.
"""

import dataclasses

from pals_jax.data.demo import changes, lexicon
from pals_jax.data.demo.grammar import Draw, Event, draw_event, draw_wording, reword, say

_SAME, _SYNONYM, _RELATED, _OTHER = 1.0, 0.8, 0.4, 0.0


def example(draw: Draw, split: str) -> tuple[str, str, str]:
    """Two sentences and their score."""
    event = draw_event(draw, split, detail=0.7)
    other = draw_event(draw, split, detail=0.7) if draw.chance(0.15) else _change(draw, event)
    reworded = reword(draw, other, 0.5)
    pair = say(event, draw_wording(draw)), say(reworded, draw_wording(draw))
    return *pair, f"{score(event, other, reworded):.1f}"


def _change(draw: Draw, event: Event) -> Event:
    """The event with any number of its roles changed."""
    kept = draw.one((0.1, 0.3, 0.5, 0.7, 0.9))
    roles: tuple[changes.Change, ...] = (
        changes.other_verb,
        changes.other_object,
        changes.other_quality,
        changes.other_place,
        changes.other_subject,
    )
    for change in roles:
        if not draw.chance(kept):
            event = change(draw, event) or event
    if not draw.chance(kept):
        event = dataclasses.replace(event, place="")
    return event


def score(event: Event, other: Event, reworded: Event) -> float:
    """The score of an event and another, which is said with the words of `reworded`."""
    roles = list(zip(event.parts, other.parts, reworded.parts, strict=True))
    filled = [role for role in roles if role[0] or role[1]]
    verbs = {event.action.verb, *event.action.opposites}
    groups = [verbs, *map(set, lexicon.MEMBERS.values())]
    noun = event.object.noun
    groups += [{value[0] for value in group} for group in lexicon.qualities(noun)]
    return 5 * sum(_closeness(*role, groups) for role in filled) / len(filled)


def _closeness(word: str, other: str, said: str, groups: list[set[str]]) -> float:
    if word == other:
        return _SAME if other == said else _SYNONYM
    return _RELATED if any({word, other} <= group for group in groups) else _OTHER
