"""ROUGE and BLEU: values by hand, the libraries' own over sets, and sets that are refused."""

import math

import pytest

from pals_jax.data import text_metrics

PREDICTIONS = ["the cats sat on a mat", "a dog", "hello there"]
REFERENCES = ["the cat sat on the mat", "the dog barked", "general"]


def test_rouge_by_hand() -> None:
    """With stemming, "cats" is "cat"; the third pair shares nothing."""
    scores = text_metrics.rouge(PREDICTIONS, REFERENCES)
    assert list(scores) == ["rouge1", "rouge2", "rougeL"]
    dog = 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)
    assert scores["rouge1"] == pytest.approx((5 / 6 + dog + 0) / 3)
    assert scores["rouge2"] == pytest.approx((3 / 5 + 0 + 0) / 3)
    assert scores["rougeL"] == pytest.approx((5 / 6 + dog + 0) / 3)


def test_bleu_by_hand() -> None:
    """Matches of 1 to 4 words: 5 of 6, 3 of 5, 2 of 4, 1 of 3."""
    score, signature = text_metrics.bleu(["the cat sat on a mat"], ["the cat sat on the mat"])
    assert score == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    short, _ = text_metrics.bleu(["the cat sat on"], ["the cat sat on the mat"])
    assert short == pytest.approx(math.exp(1 - 6 / 4))


def test_bleu_belongs_to_the_whole_set() -> None:
    """As sacrebleu has it, and not the mean of the texts' own."""
    import sacrebleu

    predictions = ["the cat sat on a mat today", "dogs bark at the old man in the park"]
    references = ["the cat sat on the mat today", "the dogs bark at the old man in a park"]
    score, _ = text_metrics.bleu(predictions, references)
    theirs = sacrebleu.corpus_bleu(predictions, [references])
    assert score == pytest.approx(theirs.score / 100)
    alone = [
        text_metrics.bleu([p], [r]).score for p, r in zip(predictions, references, strict=True)
    ]
    assert abs(score - sum(alone) / 2) > 1e-3
    assert "tok:none" in text_metrics.bleu(predictions, references, "none").signature


def test_identical_texts_are_perfect() -> None:
    long = ["one two three four five"]
    assert text_metrics.bleu(long, long).score == pytest.approx(1.0)
    assert text_metrics.rouge(long, long) == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}


@pytest.mark.parametrize("metric", [text_metrics.rouge, text_metrics.bleu])
@pytest.mark.parametrize("sets", [(["a"], []), ([], [])])
def test_sets_that_are_refused(metric, sets) -> None:
    with pytest.raises(ValueError, match="there must be as many of both, and not none"):
        metric(*sets)
