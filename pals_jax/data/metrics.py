"""The metrics of GLUE, by scikit-learn and SciPy, over a whole dev set at once.

Matthews, F1 and the correlations are properties of a set; their mean over batches is something
else.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pals_jax.runtime.errors import UserError

Metric = Callable[[np.ndarray, np.ndarray], float]


# scikit-learn and SciPy take more than a second to import; only evaluation needs them.


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
    """0 where either side is constant, for which the libraries warn and answer 0 or NaN."""

    def guarded(predictions: np.ndarray, targets: np.ndarray) -> float:
        # In float64, for float32 outputs may lie so close that SciPy doubts its result.
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


def compute(names: Sequence[str], predictions: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Metrics of the predictions for a whole set.

    F1 is that of the class with id 1. What is undefined is 0: F1 without that class in predictions
    and targets; Matthews (as scikit-learn has it) and the correlations when either is constant. A
    model that has learned nothing yet may answer with a constant, and that is no correlation rather
    than an error.

    Args:
        names: names in `METRICS`.
        predictions: [N], class ids, or values for regression.
        targets: [N], alike.

    Returns:
        Each metric by its name; not multiplied by 100.

    Raises:
        UserError: there is no metric of that name.
        ValueError: the arrays are empty, differ in shape, or a prediction is not finite.
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
    """The metrics of always answering the most frequent class of train, or the mean of train.

    Of classes that are equally frequent it is the one with the lowest id.

    Args:
        names: names in `METRICS`.
        train_targets: [N_train], class ids, or values for regression.
        dev_targets: [N], alike.
        is_regression: which of the two.
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

    Args:
        task_metrics: the names of its metrics.
        split_results: split -> metric.
    """
    return float(np.mean([result[task_metrics[0]] for result in split_results.values()]))


def selection_score(
    metrics: Mapping[str, Sequence[str]],
    results: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> float:
    """What the best checkpoint has most of: the mean of all tasks' `score`, each counting alike.

    Args:
        metrics: task -> the names of its metrics.
        results: task -> split -> metric.
    """
    return float(np.mean([score(names, results[task]) for task, names in metrics.items()]))
