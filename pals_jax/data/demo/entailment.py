"""The task `entailment`: what does the first sentence say of the second?

Both sentences speak of the same event, as in the usual corpora: if it happened in the kitchen, it
did not happen in the garden. Every kind below gives all three labels from the same words.
"""

import dataclasses

from pals_jax.data.demo import changes, lexicon
from pals_jax.data.demo.grammar import Draw, Event, draw_event, draw_wording, reword, say
from pals_jax.data.demo.relations import draw_relation

LABELS = ("entailment", "neutral", "contradiction")
Pair = tuple[str, str]

_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven")
# What all, most, ... of a group imply, leave open and exclude; the group has several members.
_QUANTIFIERS = {
    "all of the": (("most of the", "some of the", "every"), (), ("none of the", "not all of the")),
    "every": (("all of the", "some of the"), (), ("not all of the", "none of the")),
    "most of the": (("some of the",), ("all of the", "not all of the"), ("none of the",)),
    "some of the": ((), ("all of the", "most of the", "every", "not all of the"), ("none of the",)),
    "not all of the": ((), ("some of the", "most of the", "none of the"), ("all of the", "every")),
    "none of the": (("not all of the", "not one of the"), (), ("some of the", "all of the")),
    "not one of the": (("none of the", "not all of the"), (), ("most of the", "some of the")),
}

_EXCLUSIVE: tuple[changes.Change, ...] = (
    changes.opposite,
    changes.other_quality,
    changes.other_place,
    changes.other_time,
)


def example(draw: Draw, split: str, label: str) -> tuple[str, str, str] | None:
    """A premise, a hypothesis and their label; None if this draw makes no pair."""
    kind = draw.one((_implication, _implication, _detail, _detail, _number, _quantifier, _relation))
    pair = kind(draw, split, label)
    return None if pair is None else (*pair, label)


def _implication(draw: Draw, split: str, label: str) -> Pair | None:
    """A specific event implies the general one; denied, the general one implies the specific."""
    event = draw_event(draw, split)
    weaker = draw.one((_wider_subject, _wider_verb, _wider_object, _fewer_adverbials))
    general = weaker(draw, event)
    if general is None:
        return None
    not_event, not_general = changes.negate(draw, event), changes.negate(draw, general)
    if draw.chance(0.5):
        premise, hypothesis = {
            "entailment": (event, general),
            "neutral": (general, event),
            "contradiction": (event, not_general),
        }[label]
    else:
        premise, hypothesis = {
            "entailment": (not_general, not_event),
            "neutral": (not_event, not_general),
            "contradiction": (not_general, event),
        }[label]
    return _say(draw, premise, hypothesis)


def _wider_subject(draw: Draw, event: Event) -> Event | None:
    name = lexicon.CLASS_OF.get(event.subject.noun)
    return event.with_subject(noun=name, determiner="a", adjective="") if name else None


def _wider_object(draw: Draw, event: Event) -> Event | None:
    name = lexicon.CLASS_OF.get(event.object.noun)
    return event.with_object(noun=name, determiner="a", adjective="") if name else None


def _wider_verb(draw: Draw, event: Event) -> Event | None:
    implied = event.action.implied
    if implied is None or event.verb != event.action.verb:
        return None
    return dataclasses.replace(event, verb=implied)


def _fewer_adverbials(draw: Draw, event: Event) -> Event | None:
    if not event.place and not event.time:
        return None
    return dataclasses.replace(event, place="", time="")


def _detail(draw: Draw, split: str, label: str) -> Pair | None:
    """The same in other words, with one detail more, or with one that excludes the premise.

    Of all three labels half leave out another detail, so that the length says nothing.
    """
    event = draw_event(draw, split)
    shorter = changes.drop_detail(draw, event) if draw.chance(0.5) else event
    if shorter is None:
        return None
    if label == "entailment":
        change: changes.Change = _in_other_words
    elif label == "neutral":
        change = changes.add_detail
    else:
        change = draw.one(_EXCLUSIVE)
    other = change(draw, shorter)
    return None if other is None else _say(draw, event, other)


def _in_other_words(draw: Draw, event: Event) -> Event | None:
    other = reword(draw, event, 1.0)
    return other if other != event else None


def _number(draw: Draw, split: str, label: str) -> Pair | None:
    """How many there were: "four", "more than two", "fewer than five"."""
    event = draw_event(draw, split)
    premise, known = _draw_count(draw)
    hypothesis, claimed = _draw_count(draw)
    if premise == hypothesis:
        return None
    relation = "neutral"
    if known <= claimed:
        relation = "entailment"
    elif not known & claimed:
        relation = "contradiction"
    if relation != label:
        return None
    counted = event.with_subject(determiner=premise), event.with_subject(determiner=hypothesis)
    return _say(draw, *counted)


def _draw_count(draw: Draw) -> tuple[str, frozenset[int]]:
    """A numeral and the counts that it allows, up to 20."""
    number = draw.one(range(2, 7))
    word = _NUMBERS[number - 1]
    return draw.one(
        (
            (word, frozenset({number})),
            (f"more than {word}", frozenset(range(number + 1, 20))),
            (f"fewer than {_NUMBERS[number]}", frozenset(range(number + 1))),
        )
    )


def _quantifier(draw: Draw, split: str, label: str) -> Pair | None:
    """How many of a group: all, most, some, none."""
    event = draw_event(draw, split)
    known = draw.one(tuple(_QUANTIFIERS))
    claims = _QUANTIFIERS[known][LABELS.index(label)]
    if not claims:
        return None
    premise = event.with_subject(determiner=known, adjective="")
    return _say(draw, premise, premise.with_subject(determiner=draw.one(claims)))


def _relation(draw: Draw, split: str, label: str) -> Pair:
    """Two people, or two events: see `relations`."""
    relation = draw_relation(draw, split)
    hypothesis = {
        "entailment": relation.same,
        "neutral": relation.unknown,
        "contradiction": relation.excluded,
    }
    return relation.text, hypothesis[label]


def _say(draw: Draw, premise: Event, hypothesis: Event) -> Pair:
    return say(premise, draw_wording(draw)), say(reword(draw, hypothesis, 0.3), draw_wording(draw))
