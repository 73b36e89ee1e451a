"""The task `paraphrase`: do two sentences say the same?

Both labels reword the sentence in the same ways (synonyms, passive, order); "different" also
changes one part of the meaning, or who does what to whom.
"""

from pals_jax.data.demo import changes
from pals_jax.data.demo.grammar import Draw, draw_event, draw_wording, reword, say
from pals_jax.data.demo.relations import draw_relation

LABELS = ("different", "same")
_CHANGES: tuple[changes.Change, ...] = (
    changes.opposite,
    changes.other_quality,
    changes.other_place,
    changes.other_time,
    changes.other_subject,
    changes.other_object,
    changes.negate,
)


def example(draw: Draw, split: str, label: str) -> tuple[str, str, str] | None:
    """Two sentences and their label; None if this draw makes no pair."""
    if draw.chance(0.35):
        relation = draw_relation(draw, split)
        different = draw.one((relation.excluded, relation.unknown))
        return relation.text, relation.same if label == "same" else different, label

    event = draw_event(draw, split, detail=0.6)
    if draw.chance(0.15):
        event = changes.negate(draw, event)
    other_event = event if label == "same" else draw.one(_CHANGES)(draw, event)
    if other_event is None:
        return None
    # "Same" changes more words, so that the share of common words does not give the label away.
    other_event = reword(draw, other_event, 1.0 if label == "same" else 0.5)
    pair = say(event, draw_wording(draw)), say(other_event, draw_wording(draw))
    return *pair, label
