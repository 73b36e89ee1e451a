"""Differences between two arms, with 95% intervals over seeds and dev examples, and verdicts."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import sacrebleu.metrics
from scipy import stats

from results.claims import Claim

RESAMPLES = 1000
BLEU = "bleu"
VERDICTS = ("holds", "does not hold", "not decided here")


@dataclasses.dataclass(frozen=True)
class Side:
    """What an arm answers on a dev set.

    Attributes:
        answers: [S, N], of each seed and example: class ids, or values in [0, 1]. Of a text what
            BLEU sums over texts, [S, N, 9]: the n-grams that match, all n-grams, and the length. An
            arm that is not trained has one row.
        truth: [N]; of a text the length of the reference.
        metric: the metric of the task.
    """

    answers: np.ndarray
    truth: np.ndarray
    metric: str

    @classmethod
    def of_texts(cls, answers: np.ndarray, references: np.ndarray) -> "Side":
        """The side of texts: [S, N], for the references [N]."""
        metric = sacrebleu.metrics.BLEU(effective_order=True)  # the counts are the same
        rows = [
            [
                (*found.counts, *found.totals, found.sys_len, found.ref_len)
                for text, reference in zip(row.tolist(), references.tolist(), strict=True)
                for found in [metric.sentence_score(text, [reference])]
            ]
            for row in answers
        ]
        counts = np.array(rows)
        return cls(counts[..., :-1], counts[0, :, -1], BLEU)

    def scores(self, examples: np.ndarray | None = None) -> np.ndarray:
        """The metric x 100 of each seed, [S], on all examples or those of a resample."""
        chosen = slice(None) if examples is None else examples
        truth = self.truth[chosen]
        return np.array([100 * _score(self.metric, row[chosen], truth) for row in self.answers])

    def score(self, examples: np.ndarray | None = None) -> float:
        """The mean over seeds of `scores`."""
        return float(self.scores(examples).mean())


def _score(metric: str, answers: np.ndarray, truth: np.ndarray) -> float:
    """A metric as in `pals_jax.data.metrics`, whose libraries take too long for all resamples."""
    if metric == BLEU:
        *counts, length = answers.sum(0).tolist()
        sums = counts[:4], counts[4:], length, int(truth.sum())
        return sacrebleu.metrics.BLEU.compute_bleu(*sums, smooth_method="exp").score / 100.0
    if metric == "pearson":
        x, y = answers.astype(np.float64), truth.astype(np.float64)
        return 0.0 if np.ptp(x) == 0 or np.ptp(y) == 0 else float(np.corrcoef(x, y)[0, 1])
    hits = np.bincount(2 * (truth == 1) + (answers == 1), minlength=4).astype(np.float64)
    neither, false, missed, both = hits
    if metric == "f1":
        return float(2 * both / max(2 * both + false + missed, 1.0))
    if metric == "matthews":  # of two classes
        product = (both + false) * (both + missed) * (neither + false) * (neither + missed)
        return float((both * neither - false * missed) / np.sqrt(product)) if product else 0.0
    if metric != "accuracy":
        raise ValueError(f"there is no metric {metric!r} here")
    return float((answers == truth).mean())


@dataclasses.dataclass(frozen=True)
class Difference:
    """The mean over tasks of one arm's score minus another's, in points, and its 95% interval."""

    value: float
    low: float
    high: float


def difference(
    ones: Sequence[Side], others: Sequence[Side], seeds: int, together: bool
) -> Difference:
    """Compares two arms, task by task on the same seeds and examples.

    The interval is the percentile bootstrap's. Each resample draws dev examples of each task and
    seeds with replacement, the same ones for both arms. What the drawn seeds change is widened, so
    that an interval of seeds alone is about Student's: few seeds would give one far too narrow.

    Args:
        ones: the first arm on each task.
        others: the second arm on the same tasks.
        seeds: the number of seeds.
        together: whether a seed is one model of all tasks, and so drawn once for all of them.
    """
    rng = np.random.default_rng(0)
    wider = _widening(seeds, 1 if together else len(ones))

    def mean_difference(*examples: np.ndarray) -> float:
        points, common = [], rng.integers(0, seeds, seeds)
        for one, other, drawn in zip(ones, others, examples, strict=True):
            chosen = common if together else rng.integers(0, seeds, seeds)
            of_seeds = np.broadcast_to(one.scores(drawn) - other.scores(drawn), seeds)
            points.append(of_seeds.mean() + wider * (of_seeds[chosen].mean() - of_seeds.mean()))
        return float(np.mean(points))

    pairs = zip(ones, others, strict=True)
    value = float(np.mean([one.score() - other.score() for one, other in pairs]))
    interval = stats.bootstrap(
        [np.arange(len(one.truth)) for one in ones],
        mean_difference,
        n_resamples=RESAMPLES,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    return Difference(value, float(interval.low), float(interval.high))


def _widening(seeds: int, draws: int) -> float:
    """Student's interval over the bootstrap's, of a mean over so many independent sets of seeds."""
    if seeds == 1:
        return 1.0
    ratio = stats.t.ppf(0.975, draws * (seeds - 1)) / stats.norm.ppf(0.975)
    return float(ratio * np.sqrt(seeds / (seeds - 1)))


def verdict(claim: Claim, found: Sequence[Difference | None], moved: float = 0.0) -> str:
    """The rule of `claims.toml`: one of `VERDICTS`.

    Args:
        claim: the claim.
        found: the difference of each of its pairs, or None for a pair without all its runs.
        moved: the largest change of an earlier task's parameters, of tasks added one after another.
    """
    if moved or any(each is not None and each.high < -claim.margin for each in found):
        return VERDICTS[1]
    if all(each is not None and each.low > -claim.margin for each in found):
        return VERDICTS[0]
    return VERDICTS[2]
