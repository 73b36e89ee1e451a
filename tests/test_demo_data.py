"""The bundled tasks: reproducible, clean, and not solvable by counting words."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import hstack
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import AutoTokenizer

from pals_jax.data import demo
from pals_jax.data.demo import (
    changes,
    entailment,
    grammar,
    lexicon,
    paraphrase,
    reviews,
    similarity,
)
from pals_jax.data.demo.generate import generate
from pals_jax.data.demo.grammar import Draw, Wording, draw_event, say

PAIRS = ("paraphrase", "entailment", "similarity")
CLASSES = ("sentiment", "paraphrase", "entailment")


def read(task: str, split: str) -> list[list[str]]:
    """The rows of a file, as anybody would read them."""
    text = Path(demo.TASKS[task][split]).read_text(encoding="utf-8")
    header, *rows = (line.split("\t") for line in text.splitlines())
    assert header == [*demo.TASKS[task]["text"], demo.TASKS[task]["label"]]
    return rows


def texts(rows: list[list[str]]) -> list[str]:
    return [text for row in rows for text in row[:-1]]


def test_the_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pals_jax.data.demo.generate", tmp_path / "made"]
    subprocess.run(command, check=True)
    made = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    bundled = {name: demo.path(name).read_bytes() for name in made}
    assert made == bundled
    assert sorted(made) == sorted(path.name for path in demo.path("").glob("*.tsv"))
    assert sum(map(len, made.values())) < 500_000


def test_another_seed_gives_other_sentences() -> None:
    assert generate(0) == generate(0)
    assert generate(0)["sentiment_dev.tsv"] != generate(1)["sentiment_dev.tsv"]


@pytest.mark.parametrize("task", demo.TASKS)
def test_rows_are_well_formed_and_dev_is_new(task: str) -> None:
    train, dev = read(task, "train"), read(task, "dev")
    columns = len(demo.TASKS[task]["text"]) + 1
    for rows in (train, dev):
        assert {len(row) for row in rows} == {columns}
        assert len({tuple(row) for row in rows}) == len(rows)
        for text in texts(rows):
            assert text.isascii()
            assert text[0].isupper()
            assert text.endswith(".")
            assert "  " not in text
            assert len(text.split()) <= 20
    assert len(dev) >= 200
    assert not set(texts(train)) & set(texts(dev))


@pytest.mark.parametrize("task", CLASSES)
def test_classes_are_equally_frequent(task: str) -> None:
    for split in ("train", "dev"):
        counts = Counter(row[-1] for row in read(task, split))
        assert sorted(counts) == sorted(demo.TASKS[task]["labels"])
        assert max(counts.values()) - min(counts.values()) <= 1


def test_scores_spread_over_the_range() -> None:
    scores = np.array([float(row[-1]) for row in read("similarity", "train")])
    assert scores.min() == 0.0
    assert scores.max() == 5.0
    assert min(np.histogram(scores, 5, (0, 5))[0]) >= 20


def test_declared_labels_are_those_of_the_generator() -> None:
    assert demo.TASKS["sentiment"]["labels"] == reviews.LABELS
    assert demo.TASKS["paraphrase"]["labels"] == paraphrase.LABELS
    assert demo.TASKS["entailment"]["labels"] == entailment.LABELS


def _bag_of_words_accuracy(task: str, columns: slice) -> float:
    train, dev = read(task, "train"), read(task, "dev")
    features = []
    for rows in (train, dev):
        bags = []
        for column in range(len(train[0]) - 1)[columns]:
            vectorizer = CountVectorizer().fit([row[column] for row in train])
            bags.append(vectorizer.transform([row[column] for row in rows]))
        features.append(hstack(bags))
    model = LogisticRegression(max_iter=2000).fit(features[0], [row[-1] for row in train])
    return float(model.score(features[1], [row[-1] for row in dev]))


@pytest.mark.parametrize(
    ("task", "columns", "limit"),
    [
        ("sentiment", slice(None), 0.8),
        ("paraphrase", slice(None), 0.65),
        ("entailment", slice(None), 0.6),
        ("paraphrase", slice(1, 2), 0.65),  # the second sentence alone
        ("entailment", slice(1, 2), 0.55),  # the hypothesis alone
    ],
)
def test_a_bag_of_words_is_not_enough(task: str, columns: slice, limit: float) -> None:
    assert _bag_of_words_accuracy(task, columns) < limit


def test_common_words_do_not_tell_a_paraphrase() -> None:
    def counts(split: str) -> np.ndarray:
        pairs = [
            [set(re.findall(r"\w+", text.lower())) for text in row[:2]]
            for row in read("paraphrase", split)
        ]
        return np.array([[len(x & y), len(x - y), len(y - x)] for x, y in pairs])

    labels = {split: [row[-1] for row in read("paraphrase", split)] for split in ("train", "dev")}
    model = LogisticRegression(max_iter=2000).fit(counts("train"), labels["train"])
    assert model.score(counts("dev"), labels["dev"]) < 0.65


@pytest.mark.parametrize("task", CLASSES)
def test_lengths_do_not_give_the_label_away(task: str) -> None:
    train, dev = (
        np.array([[len(text.split()) for text in row[:-1]] for row in read(task, split)])
        for split in ("train", "dev")
    )
    labels = {split: [row[-1] for row in read(task, split)] for split in ("train", "dev")}
    model = LogisticRegression(max_iter=2000).fit(train, labels["train"])
    chance = 1 / len(demo.TASKS[task]["labels"])
    assert model.score(dev, labels["dev"]) < chance + 0.12


def test_pairs_fit_48_tokens(minilm: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    for task in PAIRS:
        rows = read(task, "train") + read(task, "dev")
        ids = tokenizer([row[0] for row in rows], [row[1] for row in rows])["input_ids"]
        assert max(map(len, ids)) <= 48


def test_the_vocabulary_is_varied() -> None:
    words = {word.strip(".,").lower() for task in demo.TASKS for word in _words(task)}
    assert len(words) > 700


def _words(task: str) -> list[str]:
    return [word for text in texts(read(task, "train")) for word in text.split()]


def test_held_out_combinations_occur_in_dev_events_only() -> None:
    def combinations(split: str) -> set[tuple[str, str]]:
        draw = Draw(1)
        events = [draw_event(draw, split) for _ in range(3000)]
        return {(event.action.verb, event.object.noun) for event in events}

    held_out = {
        (action.verb, action.objects[-1]) for domain in lexicon.DOMAINS for action in domain.actions
    }
    # Two domains may list a verb; what one holds out the other may use.
    shown = {
        (action.verb, noun)
        for domain in lexicon.DOMAINS
        for action in domain.actions
        for noun in action.choices("train")
    }
    assert not (held_out - shown) & combinations("train")
    assert len((held_out - shown) & combinations("dev")) > 80
    train = " ".join(text for task in PAIRS for text in texts(read(task, "train")))
    for verb, noun in held_out - shown:
        assert not re.search(rf"{lexicon.past(verb)} the (\w+ )?{noun}\b", train), (verb, noun)


def _event() -> grammar.Event:
    """The young chef fried the big mushroom in the kitchen in the morning."""
    domain = lexicon.DOMAINS[0]
    return grammar.Event(
        domain,
        domain.actions[0],
        grammar.NounPhrase("chef", "young"),
        "fry",
        grammar.NounPhrase("mushroom", "big"),
        "in the kitchen",
        "in the morning",
    )


def test_wordings_of_an_event() -> None:
    event = _event()
    assert say(event, Wording()) == (
        "The young chef fried the big mushroom in the kitchen in the morning."
    )
    assert say(event, Wording(passive=True, time_first=True)) == (
        "In the morning, the big mushroom was fried by the young chef in the kitchen."
    )
    assert say(changes.negate(Draw(0), event), Wording(place_first=True)) == (
        "In the kitchen, the young chef did not fry the big mushroom in the morning."
    )
    general = event.with_object(noun="vegetable", determiner="a", adjective="")
    assert say(changes.negate(Draw(0), general), Wording()) == (
        "The young chef did not fry any vegetables in the kitchen in the morning."
    )


def test_word_forms() -> None:
    forms = {
        "child": "children", "piece of luggage": "pieces of luggage", "apple tree": "apple trees",
        "cherry": "cherries", "tomato": "tomatoes", "boy": "boys", "box": "boxes", "soup": "soup",
    }  # fmt: skip
    assert {noun: lexicon.plural(noun) for noun in forms} == forms
    pasts = {"dig up": "dug up", "carry": "carried", "chop": "chopped", "fix": "fixed"}
    assert {verb: lexicon.past(verb) for verb in pasts} == pasts
    assert lexicon.past("break", participle=True) == "broken"
    assert lexicon.with_article("umbrella") == "an umbrella"
    assert lexicon.with_article("uniform") == "a uniform"
    assert lexicon.with_article("hot soup") == "some hot soup"


def test_similarity_follows_its_rule() -> None:
    event = _event()
    assert similarity.score(event, event, event) == 5.0
    synonym = event.with_object(adjective="large")
    assert similarity.score(event, event, synonym) == pytest.approx(4.8)
    related = event.with_object(noun="potato")
    assert similarity.score(event, related, related) == pytest.approx(4.4)
    other = event.with_subject(noun="baker")
    assert similarity.score(event, other, other) == pytest.approx(4.4)  # both are employees
    opposite = event.with_object(adjective="small")
    assert similarity.score(event, opposite, opposite) == pytest.approx(4.4)
    without = event.with_object(adjective="")
    assert similarity.score(event, without, without) == pytest.approx(4.0)
