"""Reads `words`: who does what to what, and how words relate."""

import dataclasses
import re

from pals_jax.data.demo import words


@dataclasses.dataclass(frozen=True)
class Action:
    """What can be done to some objects; the verbs are in their base form."""

    verb: str
    synonyms: tuple[str, ...]
    implied: str | None
    opposites: tuple[str, ...]
    objects: tuple[str, ...]

    def choices(self, split: str) -> tuple[str, ...]:
        """The objects that a split may use: the last one is held out for dev."""
        return self.objects if split == "dev" else self.objects[:-1]


@dataclasses.dataclass(frozen=True)
class Domain:
    """Who does what where."""

    people: tuple[str, ...]
    places: tuple[str, ...]
    actions: tuple[Action, ...]


def _items(text: str) -> tuple[str, ...]:
    """The first word of each group of synonyms in "a = b, c, d"; the groups are remembered."""
    groups = [tuple(word.strip() for word in group.split("=")) for group in text.split(",")]
    SYNONYMS.update({group[0]: group[1:] for group in groups if len(group) > 1})
    return tuple(group[0] for group in groups)


def _action(line: str) -> Action:
    verbs, objects = line.split(":")
    signed = re.findall(r"(^|[=>!])\s*([^=>!]+)", verbs.strip())
    opposites, synonyms, implied, opposed = [], [], None, False
    for sign, verb in signed:
        opposed = opposed or sign == "!"  # synonyms after the opposite are the opposite's
        if opposed:
            opposites.append(verb.strip())
        elif sign == ">":
            implied = verb.strip()
        else:
            synonyms.append(verb.strip())
    return Action(synonyms[0], tuple(synonyms[1:]), implied, tuple(opposites), _items(objects))


def _domain(block: str) -> Domain:
    people, places, *actions = block.strip().splitlines()[1:]
    return Domain(
        _items(people.removeprefix("people:")),
        _items(places.removeprefix("places:")),
        tuple(_action(line) for line in actions),
    )


SYNONYMS: dict[str, tuple[str, ...]] = {}  # of nouns and places
DOMAINS = tuple(_domain(block) for block in words.DOMAINS.strip().split("\n\n"))
MEMBERS: dict[str, tuple[str, ...]] = {
    name: _items(members)
    for name, members in (line.split(":") for line in words.CLASSES.strip().splitlines())
}
CLASS_OF = {member: name for name, members in MEMBERS.items() for member in members}
# Of a class or a noun: its qualities, each a group of values, each with its synonyms.
_QUALITIES: dict[str, list[tuple[tuple[str, ...], ...]]] = {}
for _line in words.QUALITIES.strip().splitlines():
    _values, _bearers = _line.split(":")
    for _bearer in _bearers.split(","):
        _QUALITIES.setdefault(_bearer.strip(), []).append(
            tuple(tuple(word.strip() for word in value.split("=")) for value in _values.split(","))
        )
_IRREGULAR = {
    base: (past, participle)
    for base, past, participle in (verb.split() for verb in words.IRREGULAR_VERBS.split(","))
}


def qualities(noun: str) -> list[tuple[tuple[str, ...], ...]]:
    """The groups of exclusive qualities that a noun may have; each value has its synonyms."""
    return _QUALITIES.get(noun, []) + _QUALITIES.get(CLASS_OF.get(noun, ""), [])


def adjectives(noun: str) -> list[str]:
    """The adjectives that suit a noun."""
    return [value[0] for group in qualities(noun) for value in group]


def adjective_synonyms(noun: str, adjective: str) -> tuple[str, ...]:
    """Other words for a quality of this noun; none for a word that already is another word."""
    values = (value for group in qualities(noun) for value in group if value[0] == adjective)
    return next(values, ())[1:]


def exclusive_adjectives(noun: str, adjective: str) -> list[str]:
    """What the noun cannot be when it is that."""
    groups = ([value[0] for value in group] for group in qualities(noun))
    group = next(values for values in groups if adjective in values)
    return [value for value in group if value != adjective]


def plural(noun: str) -> str:
    """Its plural; of "piece of luggage" that of its first word. Mass nouns have none."""
    head, of, rest = noun.partition(" of ")
    if of:
        return plural(head) + of + rest
    first, space, last = noun.rpartition(" ")
    if last in words.MASS:
        return noun
    if last in words.IRREGULAR_PLURALS:
        last = words.IRREGULAR_PLURALS[last]
    elif re.search(r"(s|x|ch|sh|potato|tomato)$", last):
        last += "es"
    elif re.search(r"[^aeiou]y$", last):
        last = last[:-1] + "ies"
    else:
        last += "s"
    return first + space + last


def past(verb: str, participle: bool = False) -> str:
    """Its past tense, or its past participle; of "dig up" that of its first word."""
    head, space, particle = verb.partition(" ")
    if head in _IRREGULAR:
        head = _IRREGULAR[head][participle]
    elif head.endswith("e"):
        head += "d"
    elif re.search(r"[^aeiou]y$", head):
        head = head[:-1] + "ied"
    elif head in words.DOUBLED:
        head += head[-1] + "ed"
    else:
        head += "ed"
    return head + space + particle


def with_article(phrase: str) -> str:
    """The phrase with "a" or "an"; with "some" before a mass noun."""
    if phrase.rsplit(maxsplit=1)[-1] in words.MASS:
        return f"some {phrase}"
    vowel = re.match(r"[aeiou](?!ni[^n])", phrase)  # an hour is not among the words; a university
    return f"{'an' if vowel else 'a'} {phrase}"
