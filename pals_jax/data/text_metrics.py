"""Metrics of generated texts: ROUGE of summaries and BLEU of translations, over whole sets."""

from collections.abc import Sequence
from typing import NamedTuple

ROUGE = ("rouge1", "rouge2", "rougeL")


class Bleu(NamedTuple):
    """The BLEU of a set of texts, from 0 to 1, and the signature that says how it was computed."""

    score: float
    signature: str


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004), by rouge-score: means of F1, from 0 to 1.

    With Porter's stemmer, as in the summarisation scripts that He et al. use.

    Raises:
        ValueError: there is no text, or the two differ in number.
    """
    from rouge_score.rouge_scorer import RougeScorer  # takes a second to import

    _check(predictions, references)
    scorer = RougeScorer(ROUGE, use_stemmer=True)
    scores = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
    return {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in ROUGE}


def bleu(predictions: Sequence[str], references: Sequence[str], tokenize: str = "13a") -> Bleu:
    """BLEU (Papineni et al. 2002) of the whole set, by sacrebleu.

    Args:
        predictions: the texts.
        references: one for each.
        tokenize: a tokenizer of sacrebleu: "13a", its default, or "none" where texts are tokenised.

    Raises:
        ValueError: there is no text, or the two differ in number.
    """
    from sacrebleu.metrics import BLEU

    _check(predictions, references)
    metric = BLEU(tokenize=tokenize)
    score = metric.corpus_score(predictions, [references]).score / 100
    return Bleu(score, str(metric.get_signature()))


def bleu_signature() -> str:
    """How `bleu` computes it by default, in sacrebleu's words."""
    return bleu(["a"], ["a"]).signature


def _check(predictions: Sequence[str], references: Sequence[str]) -> None:
    if len(predictions) != len(references) or not references:
        raise ValueError(
            f"{len(predictions)} predictions and {len(references)} references: there must be as"
            " many of both, and not none."
        )
