"""The metrics of GLUE, computed by scikit-learn and SciPy over a whole dev set, and those of texts.

Matthews, F1 and the correlations must be computed over the whole set; a mean over batches differs.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pals_jax.runtime.errors import UserError

Metric = Callable[[np.ndarray, np.ndarray], float]


# Imported in functions: scikit-learn and SciPy take over a second, and only evaluation uses them.


def _accuracy(predictions: np.ndarray, targets: np.ndarray) -> float:
    from sklearn.metrics import accuracy_score

    return accuracy_score(targets, predictions)


def _matthews(predictions: np.ndarray, targets: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    return matthews_corrcoef(targets, predictions)


def _pearson(predictions: np.ndarray, targets: np.ndarray) -> float:
    from scipy import stats

    return stats.pearsonr(predictions, targets).statistic


def _spearman(predictions: np.ndarray, targets: np.ndarray) -> float:
    from scipy import stats

    return stats.spearmanr(predictions, targets).statistic


def _f1(predictions: np.ndarray, targets: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return f1_score(targets == 1, predictions == 1, zero_division=0.0)


def _unless_constant(correlation: Metric) -> Metric:
    """Returns 0 if either side is constant, where the libraries warn and return 0 or NaN."""

    def guarded(predictions: np.ndarray, targets: np.ndarray) -> float:
        # In float64, because SciPy warns about precision if float32 outputs lie very close.
        x, y = predictions.astype(np.float64), targets.astype(np.float64)
        return 0.0 if np.ptp(x) == 0 or np.ptp(y) == 0 else correlation(x, y)

    return guarded


METRICS: dict[str, Metric] = {  # of predictions and targets, both [N]
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _unless_constant(_matthews),
    "pearson": _unless_constant(_pearson),
    "spearman": _unless_constant(_spearman),
}

CORRELATIONS = ("pearson", "spearman")  # of regression; the others are of classes

# Of texts, each of the mean over all tokens of -log p(token), in nats; without label smoothing.
TEXT_METRICS: dict[str, Callable[[float], float]] = {
    "loss": lambda loss: loss,
    "perplexity": lambda loss: math.exp(min(loss, 700.0)),  # e^710 is no float64
}
# As a score, a loss is the probability of a token that it means: from 0 to 1, and more is better.
_SCORES: dict[str, Callable[[float], float]] = {
    "loss": lambda loss: math.exp(-loss),
    "perplexity": lambda perplexity: 1.0 / perplexity,
}


def of_texts(names: Sequence[str], losses: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
    """Metrics of the target texts of a whole set under a model.

    Args:
        names: names in `TEXT_METRICS`.
        losses: float [N]; the sum over each text's tokens of -log p(token).
        lengths: int [N]; the number of these tokens.

    Returns:
        Each metric by name.
    """
    loss = float(np.sum(losses, dtype=np.float64) / np.sum(lengths))
    return {name: TEXT_METRICS[name](loss) for name in names}


def shown(name: str, value: float) -> str:
    """A metric for a person: x 100, but for those of `TEXT_METRICS`."""
    return f"{value:.3f}" if name in TEXT_METRICS else f"{100 * value:.1f}"


def compute(names: Sequence[str], predictions: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Metrics of the predictions for a whole set.

    F1 is computed for class id 1. Undefined values are 0: F1 if neither predictions nor targets
    have that class; Matthews and the correlations if either is constant. An untrained model may
    predict a constant, which is no error.

    Args:
        names: names in `METRICS`.
        predictions: [N], class ids, or values for regression.
        targets: [N], likewise.

    Returns:
        Each metric by name; not multiplied by 100.

    Raises:
        UserError: if there is no metric of that name.
        ValueError: if the arrays are empty or differ in shape, or a prediction is not finite.
    """
    if predictions.shape != targets.shape or predictions.ndim != 1 or not len(targets):
        raise ValueError(
            f"predictions {predictions.shape} and targets {targets.shape} must be two lists of the"
            " same length, and not empty"
        )
    wrong = np.flatnonzero(~np.isfinite(predictions))
    if len(wrong):
        raise ValueError(
            f"{len(wrong)} of {len(predictions)} predictions are not finite; the first is number"
            f" {wrong[0]}, {predictions[wrong[0]]}"
        )
    for name in names:
        if name not in METRICS:
            raise UserError(f"there is no metric {name!r}; the metrics are {', '.join(METRICS)}.")
    return {name: float(METRICS[name](predictions, targets)) for name in names}


def majority_baseline(
    names: Sequence[str], train_targets: np.ndarray, dev_targets: np.ndarray, is_regression: bool
) -> dict[str, float]:
    """The metrics of always predicting the most frequent class, or the mean, of train.

    Ties go to the class with the lowest id.

    Args:
        names: names in `METRICS`.
        train_targets: [N_train], class ids, or values for regression.
        dev_targets: [N], likewise.
        is_regression: whether targets are regression values.
    """
    if is_regression:
        answer = np.mean(train_targets)
    else:
        classes, counts = np.unique(train_targets, return_counts=True)
        answer = classes[counts.argmax()]
    return compute(names, np.full(dev_targets.shape, answer), dev_targets)


# The nine numbers of Stickland & Murray (2019): task, metric.
_NINE = (
    ("mnli", "dev_matched", "accuracy"),
    ("mnli", "dev_mismatched", "accuracy"),
    ("qqp", "dev", "f1"),
    ("qnli", "dev", "accuracy"),
    ("sst2", "dev", "accuracy"),
    ("cola", "dev", "matthews"),
    ("stsb", "dev", "spearman"),
    ("mrpc", "dev", "f1"),
    ("rte", "dev", "accuracy"),
)


def pals_average(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> float | None:
    """The average of Stickland & Murray (2019, table 1), or None if one of its numbers is missing.

    It is the mean of nine numbers times 100: the accuracies of MNLI matched and mismatched, QNLI,
    SST-2 and RTE, the F1 of QQP and MRPC, Matthews of CoLA and Spearman's correlation of STS-B.
    The table does not say which correlation it gives for STS-B; its row of BERT-base is that of
    Devlin et al. (2019), who report Spearman's. WNLI has no part in it.

    Args:
        results: task -> split -> metric, as from `compute`.
    """
    try:
        nine = [results[task][split][metric] for task, split, metric in _NINE]
    except KeyError:
        return None
    return 100 * float(np.mean(nine))


def score(task_metrics: Sequence[str], split_results: Mapping[str, Mapping[str, float]]) -> float:
    """The one number of a task: its first metric, averaged over the splits it is evaluated on.

    A loss or perplexity becomes the geometric mean of the tokens' probabilities, e^-loss.

    Args:
        task_metrics: the names of its metrics.
        split_results: split -> metric.
    """
    name, *_ = task_metrics
    mean = float(np.mean([result[name] for result in split_results.values()]))
    return _SCORES[name](mean) if name in _SCORES else mean


def selection_score(
    metrics: Mapping[str, Sequence[str]],
    results: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> float:
    """The score that selects the best checkpoint: the unweighted mean of all tasks' `score`.

    Args:
        metrics: task -> the names of its metrics.
        results: task -> split -> metric.
    """
    return float(np.mean([score(names, results[task]) for task, names in metrics.items()]))
