"""Metrics: values counted by hand, degenerate input, and the published averages."""

import numpy as np
import pytest

from pals_jax.data import metrics
from pals_jax.runtime.errors import UserError


def test_classification_metrics_by_hand() -> None:
    targets = np.array([1, 1, 1, 0, 0, 0, 0, 0], np.float32)
    predictions = np.array([1, 1, 0, 1, 0, 0, 0, 0])  # TP 2, FN 1, FP 1, TN 4
    result = metrics.compute(("accuracy", "f1", "matthews"), predictions, targets)
    assert list(result) == ["accuracy", "f1", "matthews"]
    assert result["accuracy"] == pytest.approx(6 / 8)
    assert result["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert result["matthews"] == pytest.approx((2 * 4 - 1 * 1) / np.sqrt(3 * 3 * 5 * 5))
    assert all(type(value) is float for value in result.values())


def test_f1_is_that_of_class_one() -> None:
    targets, predictions = np.array([0, 0, 0, 1]), np.array([0, 0, 0, 0])
    assert metrics.compute(["f1"], predictions, targets) == {"f1": 0.0}
    assert metrics.compute(["f1"], 1 - predictions, 1 - targets)["f1"] == pytest.approx(6 / 7)


def test_correlations_by_hand() -> None:
    targets = np.array([0.0, 1.0, 2.0, 3.0], np.float32)
    squares = targets**2
    result = metrics.compute(("pearson", "spearman"), squares, targets)
    assert result["spearman"] == pytest.approx(1.0)
    assert result["pearson"] == pytest.approx(np.corrcoef(squares, targets)[0, 1])
    assert result["pearson"] < 0.97


def test_metrics_belong_to_the_whole_set_not_to_batches() -> None:
    rng = np.random.default_rng(0)
    targets = np.sort(rng.random(64)).astype(np.float32)
    predictions = targets + rng.normal(0, 0.1, 64).astype(np.float32)
    whole = metrics.compute(["pearson"], predictions, targets)["pearson"]
    batches = [
        metrics.compute(["pearson"], predictions[i : i + 8], targets[i : i + 8])["pearson"]
        for i in range(0, 64, 8)
    ]
    assert whole > np.mean(batches) + 0.2


def test_constant_predictions_have_no_correlation() -> None:
    values = np.full(5, 0.3, np.float32)
    targets = np.linspace(0, 1, 5, dtype=np.float32)
    for x, y in ((values, targets), (targets, values)):
        assert metrics.compute(("pearson", "spearman"), x, y) == {"pearson": 0.0, "spearman": 0.0}


def test_nearly_constant_float32_predictions_still_correlate() -> None:
    targets = np.arange(4, dtype=np.float32)
    predictions = np.full(4, 0.5, np.float32)
    for _ in range(3):
        predictions[1:] = np.nextafter(predictions[1:], np.float32(1))
    assert metrics.compute(["pearson"], predictions, targets)["pearson"] > 0.7


def test_matthews_of_a_constant_is_zero() -> None:
    assert metrics.compute(["matthews"], np.zeros(4), np.array([0, 1, 0, 1]))["matthews"] == 0.0
    assert metrics.compute(["matthews"], np.zeros(4), np.zeros(4))["matthews"] == 0.0


def test_bad_input_is_named() -> None:
    with pytest.raises(UserError, match="no metric 'bleu'; the metrics are accuracy, f1"):
        metrics.compute(["bleu"], np.zeros(2), np.zeros(2))
    with pytest.raises(ValueError, match=r"1 of 3 predictions are not finite.* number 1, nan"):
        metrics.compute(["pearson"], np.array([0.0, np.nan, 1.0]), np.zeros(3))
    with pytest.raises(ValueError, match=r"predictions \(3,\) and targets \(2,\)"):
        metrics.compute(["accuracy"], np.zeros(3), np.zeros(2))
    with pytest.raises(ValueError, match="not empty"):
        metrics.compute(["accuracy"], np.zeros(0), np.zeros(0))


def test_majority_baseline() -> None:
    train = np.array([2, 1, 1, 0, 2], np.float32)  # 1 and 2 are equally frequent
    dev = np.array([1, 1, 0, 2], np.float32)
    assert metrics.majority_baseline(["accuracy"], train, dev, False) == {"accuracy": 0.5}
    result = metrics.majority_baseline(["pearson", "spearman"], train, dev, True)
    assert result == {"pearson": 0.0, "spearman": 0.0}


# Stickland & Murray 2019, table 1: MNLI m, mm, QQP F1, QNLI, SST-2, CoLA, STS-B, MRPC F1, RTE.
PUBLISHED = (
    ((84.6, 83.4, 71.2, 90.1, 93.5, 52.1, 85.8, 88.9, 66.4), 79.6),
    ((84.0, 83.4, 70.8, 89.3, 93.4, 51.2, 83.6, 86.7, 76.6), 79.9),
    ((84.0, 83.2, 71.2, 89.7, 93.2, 47.1, 85.3, 87.5, 75.5), 79.6),
    ((84.3, 83.5, 71.5, 90.0, 92.6, 51.2, 85.8, 88.7, 76.0), 80.4),
)


def _results(row: tuple[float, ...]) -> dict[str, dict[str, dict[str, float]]]:
    matched, mismatched, qqp, qnli, sst2, cola, stsb, mrpc, rte = (x / 100 for x in row)
    return {
        "mnli": {
            "dev_matched": {"accuracy": matched},
            "dev_mismatched": {"accuracy": mismatched},
        },
        "qqp": {"dev": {"f1": qqp, "accuracy": 0.0}},
        "qnli": {"dev": {"accuracy": qnli}},
        "sst2": {"dev": {"accuracy": sst2}},
        "cola": {"dev": {"matthews": cola}},
        "stsb": {"dev": {"pearson": 0.0, "spearman": stsb}},
        "mrpc": {"dev": {"f1": mrpc, "accuracy": 0.0}},
        "rte": {"dev": {"accuracy": rte}},
    }


@pytest.mark.parametrize(("row", "average"), PUBLISHED)
def test_the_average_reproduces_the_published_rows(row: tuple[float, ...], average: float) -> None:
    result = metrics.pals_average(_results(row))
    assert result is not None
    assert round(result, 1) == average


@pytest.mark.parametrize("task", _results((0.0,) * 9))
def test_no_average_with_a_number_missing(task: str) -> None:
    results = _results(PUBLISHED[0][0])
    del results[task]
    assert metrics.pals_average(results) is None


def test_no_average_with_one_mnli_set() -> None:
    results = _results(PUBLISHED[0][0])
    del results["mnli"]["dev_mismatched"]
    assert metrics.pals_average(results) is None


def test_scores() -> None:
    mnli = {"dev_matched": {"accuracy": 0.8}, "dev_mismatched": {"accuracy": 0.6}}
    mrpc = {"dev": {"f1": 0.9, "accuracy": 0.1}}
    assert metrics.score(("accuracy",), mnli) == pytest.approx(0.7)
    assert metrics.score(("f1", "accuracy"), mrpc) == pytest.approx(0.9)
    named = {"mnli": ("accuracy",), "mrpc": ("f1", "accuracy")}
    score = metrics.selection_score(named, {"mnli": mnli, "mrpc": mrpc})
    assert score == pytest.approx(0.8)
