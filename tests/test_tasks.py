"""Tasks and the GLUE registry."""

import numpy as np
import pytest

from pals_jax.data.tasks import GLUE, Task, known_task
from pals_jax.runtime.errors import UserError


def test_registry_is_named_by_its_tasks():
    assert set(GLUE) == {
        *("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"),
        *("wnli", "ax"),
    }
    assert all(task.name == name for name, task in GLUE.items())
    assert [name for name, task in GLUE.items() if task.is_regression] == ["stsb"]
    assert {task.num_outputs for task in GLUE.values()} == {1, 2, 3}
    assert all(task.metrics for task in GLUE.values())


def test_splits():
    assert GLUE["rte"].splits == ("train", "dev", "test")
    assert GLUE["mnli"].splits == (
        *("train", "dev_matched", "dev_mismatched"),
        *("test_matched", "test_mismatched"),
    )
    assert GLUE["ax"].splits == ("test",)
    assert GLUE["ax"].labels == GLUE[GLUE["ax"].head].labels


def test_class_labels_go_there_and_back():
    mnli = GLUE["mnli"]
    assert [mnli.label_to_target(label) for label in mnli.labels] == [0.0, 1.0, 2.0]
    assert [mnli.target_to_label(target) for target in range(3)] == list(mnli.labels)
    assert GLUE["mrpc"].label_to_target(1) == 1.0  # a number, as JSON has it
    with pytest.raises(ValueError, match="'maybe' is not one of entailment, neutral"):
        mnli.label_to_target("maybe")


def test_regression_labels_are_rescaled_and_predictions_clipped():
    stsb = GLUE["stsb"]
    assert stsb.label_to_target("5.000") == 1.0
    assert stsb.label_to_target(3.75) == 0.75
    assert stsb.label_to_target("3.8") == stsb.label_to_target(np.float32(3.8))
    assert stsb.target_to_label(0.5) == 2.5
    assert (stsb.target_to_label(-0.1), stsb.target_to_label(1.1)) == (0.0, 5.0)
    task = Task("t", ("x",), label_range=(-2.0, 2.0))
    assert task.label_to_target("-1") == 0.25
    assert task.target_to_label(0.25) == -1.0
    with pytest.raises(TypeError, match="label_range"):
        Task("t", ("x",)).label_to_target("1")


@pytest.mark.parametrize("label", ["high", "", "nan", "inf"])
def test_regression_labels_are_finite_numbers(label):
    with pytest.raises(ValueError, match="not a finite number"):
        GLUE["stsb"].label_to_target(label)


def test_unknown_task_suggests_near_names():
    assert known_task("rte") is GLUE["rte"]
    with pytest.raises(UserError, match="'SST-2'; did you mean sst2"):
        known_task("SST-2")
    with pytest.raises(UserError, match="known are cola, sst2"):
        known_task("translation")
