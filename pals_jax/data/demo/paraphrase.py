"""The task `paraphrase`: do two sentences tell of the same event?

"Same" says it in other words. "Different" keeps the words and tells something else: two of who did
what to what where have changed. So the share of common words does not give the label away.
"""

from pals_jax.data.demo import changes
from pals_jax.data.demo.grammar import Draw, Event, draw_event, draw_wording, reword, say

LABELS = ("different", "same")
_CHANGED = 2  # parts of an event; at least as many have other words where it stays the same
_CHANGES: tuple[changes.Change, ...] = (
    changes.other_subject,
    changes.other_verb,
    changes.other_object,
    changes.other_place,
)


def example(draw: Draw, split: str, label: str) -> tuple[str, str, str] | None:
    """Two sentences and their label; None if this draw makes no pair."""
    event = draw_event(draw, split, detail=0.6)
    in_other_words = reword(draw, event, 1.0)
    if sum(x != y for x, y in zip(event.parts, in_other_words.parts, strict=True)) < _CHANGED:
        return None
    if label == "same":
        one, two = draw.several((event, in_other_words), 2)
    else:
        other = _other(draw, event)
        if other is None:
            return None
        rate = draw.one((0.0, 1.0))  # both in the usual words, or both in synonyms
        one, two = reword(draw, event, rate), reword(draw, other, rate)
    return say(one, draw_wording(draw)), say(two, draw_wording(draw)), label


def _other(draw: Draw, event: Event) -> Event | None:
    """Another event of the same domain."""
    other: Event | None = event
    for change in draw.several(_CHANGES, _CHANGED):
        other = other and change(draw, other)
    return other
