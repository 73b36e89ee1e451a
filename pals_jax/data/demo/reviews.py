"""The task `sentiment`: one sentence of a review, negative or positive.

What a sentence says is the sign of its quality times the signs around it ("anything but tasty"),
or that of the clause which outweighs the other ("although the room was dark, ..."), so that
counting pleasant words is not enough.
"""

from collections.abc import Callable

from pals_jax.data.demo.grammar import Draw, sentence

LABELS = ("negative", "positive")

# What is judged: its parts, and the adjectives for it, unpleasant and pleasant in turn.
_SUBJECTS = {
    "restaurant": (
        ("soup", "bread", "dessert", "fish", "curry", "breakfast"),
        (
            "bland tasteless stale greasy burnt soggy",
            "delicious tasty fresh superb crisp appetising",
        ),
    ),
    "staff": (
        ("waiter", "guide", "driver", "receptionist", "teacher", "nurse"),
        (
            "rude careless unhelpful impatient arrogant lazy",
            "friendly kind helpful patient polite attentive",
        ),
    ),
    "hotel": (
        ("room", "cabin", "flat", "bathroom", "lobby", "campsite"),
        (
            "dirty noisy cramped shabby gloomy damp",
            "spotless quiet spacious elegant bright cosy",
        ),
    ),
    "film": (
        ("plot", "acting", "ending", "dialogue", "second half", "opening scene"),
        (
            "dull clumsy predictable boring shallow tedious",
            "brilliant moving gripping clever witty original",
        ),
    ),
    "music": (
        ("singer", "orchestra", "melody", "encore", "choir", "first song"),
        (
            "dreadful lifeless feeble monotonous awful forgettable",
            "wonderful lively magnificent graceful lovely memorable",
        ),
    ),
    "device": (
        ("phone", "printer", "vacuum cleaner", "keyboard", "camera", "heater"),
        (
            "unreliable slow flimsy awkward useless faulty",
            "reliable fast sturdy handy useful excellent",
        ),
    ),
    "course": (
        ("lecture", "workshop", "textbook", "first lesson", "guided tour", "exhibition"),
        (
            "confusing disappointing pointless chaotic tiresome poor",
            "clear inspiring valuable enjoyable fascinating rewarding",
        ),
    ),
    "outing": (
        ("journey", "picnic", "match", "weather", "boat trip", "walk"),
        (
            "miserable exhausting horrible depressing terrible nasty",
            "delightful relaxing splendid pleasant marvellous glorious",
        ),
    ),
}
_VERDICTS = (
    (
        "we will never come back",
        "I want my money back",
        "I regretted every minute",
        "nobody in our group enjoyed it",
        "I would warn my friends against it",
        "we left as early as we could",
        "it was a waste of an afternoon",
        "my parents were bitterly disappointed",
    ),
    (
        "we will gladly come back",
        "it was worth every penny",
        "I enjoyed every minute",
        "everybody in our group loved it",
        "I would recommend it to my friends",
        "we stayed as long as we could",
        "it made our afternoon",
        "my parents were truly delighted",
    ),
)


class _Review:
    """The words for one sentence about one subject."""

    def __init__(self, draw: Draw, split: str):
        self.draw = draw
        self.split = split
        self.parts, adjectives = draw.one(tuple(_SUBJECTS.values()))
        self.adjectives = tuple(words.split() for words in adjectives)

    def about(self, sign: int) -> tuple[str, str]:
        """A part, and an adjective for it that is pleasant (1) or not (0).

        A fourth of the combinations occurs in dev only.
        """
        while True:
            part = self.draw.one(self.parts)
            adjective = self.draw.one(self.adjectives[sign])
            held_out = (self.parts.index(part) + self.adjectives[sign].index(adjective)) % 4 == 0
            if self.split == "dev" or not held_out:
                return part, adjective

    def verdict(self, sign: int) -> str:
        """A closing remark."""
        return self.draw.one(_VERDICTS[sign])


def _plain(review: _Review, sign: int) -> str:
    part, adjective = review.about(sign)
    degree = review.draw.one(("", "really ", "very ", "so ", "simply ", "quite "))
    return f"the {part} was {degree}{adjective}, and {review.verdict(sign)}"


def _two_parts(review: _Review, sign: int) -> str:
    (part, adjective), (other, quality) = review.about(sign), review.about(sign)
    if part == other or adjective == quality:
        return f"the {part} was {adjective} from beginning to end"
    return f"the {part} was {adjective} and the {other} was {quality}"


def _denied(review: _Review, sign: int) -> str:
    part, adjective = review.about(1 - sign)
    return review.draw.one(
        (
            f"the {part} was not {adjective} at all",
            f"the {part} was anything but {adjective}",
            f"there was nothing {adjective} about the {part}",
            f"nobody could call the {part} {adjective}",
            f"the {part} was far from {adjective}",
            f"the {part} was never {adjective}, not even for a moment",
        )
    )


def _expected(review: _Review, sign: int) -> str:
    (part, adjective), (_, expected) = review.about(sign), review.about(1 - sign)
    return review.draw.one(
        (
            f"I expected the {part} to be {expected}, not {adjective}",
            f"the {part} that people had called {expected} was {adjective}",
            f"the {part} used to be {expected} and is now {adjective}",
        )
    )


def _outweighed(review: _Review, sign: int) -> str:
    part, adjective = review.about(1 - sign)
    return review.draw.one(
        (
            f"although the {part} was {adjective}, {review.verdict(sign)}",
            f"the {part} was {adjective}, and still {review.verdict(sign)}",
            f"even though the {part} was rather {adjective}, on the whole {review.verdict(sign)}",
        )
    )


_TEMPLATES: tuple[Callable[[_Review, int], str], ...] = (
    _plain,
    _two_parts,
    _denied,
    _expected,
    _outweighed,
)


def example(draw: Draw, split: str, label: str) -> tuple[str, str]:
    """A sentence and its label."""
    review = _Review(draw, split)
    return sentence(draw.one(_TEMPLATES)(review, LABELS.index(label))), label
