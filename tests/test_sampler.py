"""The task sampler: published probabilities, frequencies, whole passes, random access."""

import numpy as np
import pytest
import scipy.stats

from pals_jax.data.sampler import SAMPLING_SCHEDULES, Sampler, task_probabilities
from pals_jax.runtime.errors import UserError

# The sizes in the code of Stickland & Murray: CoLA, MRPC, MNLI, RTE, STS-B, SST-2, QQP, QNLI.
GLUE_SIZES = (6680, 2865, 306798, 1945, 4491, 52616, 284257, 84715)


def make_sampler(**changes) -> Sampler:
    values = {
        "sizes": (50, 7, 200),
        "schedule": "annealed",
        "seed": 3,
        "epochs": 4,
        "steps_per_epoch": 100,
        "groups": 1,
        "group_size": 8,
    }
    return Sampler(**values | changes)


def test_last_epoch_of_annealing_as_published():
    published = [0.0910, 0.0768, 0.1956, 0.0711, 0.0840, 0.1375, 0.1927, 0.1512]
    got = task_probabilities(GLUE_SIZES, "annealed", 25, 25)
    np.testing.assert_allclose(got, published, atol=5e-5)


def test_schedules_are_powers_of_the_sizes():
    sizes = np.array(GLUE_SIZES, float)
    for schedule, alpha in {"round_robin": 0.0, "proportional": 1.0, "sqrt": 0.5}.items():
        want = sizes**alpha / np.sum(sizes**alpha)
        for epoch in (1, 7, 25):
            np.testing.assert_allclose(task_probabilities(sizes, schedule, epoch, 25), want)
    for epoch in (1, 13, 25):
        alpha = 1 - 0.8 * (epoch - 1) / 24
        want = sizes**alpha / np.sum(sizes**alpha)
        np.testing.assert_allclose(task_probabilities(sizes, "annealed", epoch, 25), want)


def test_annealing_over_one_epoch_is_proportional():
    one = task_probabilities(GLUE_SIZES, "annealed", 1, 1)
    np.testing.assert_array_equal(one, task_probabilities(GLUE_SIZES, "proportional", 1, 1))


@pytest.mark.parametrize("schedule", ["proportional", "sqrt", "annealed"])
def test_frequencies_follow_the_probabilities(schedule):
    epochs, steps = 5, 4000
    sizes = tuple(size // 100 for size in GLUE_SIZES)
    sampler = make_sampler(sizes=sizes, schedule=schedule, epochs=epochs, steps_per_epoch=steps)
    tasks = np.array([sampler.draw(step).trained_ids[0] for step in range(epochs * steps)])
    for epoch, drawn in enumerate(tasks.reshape(epochs, steps), 1):
        expected = steps * task_probabilities(sizes, schedule, epoch, epochs)
        observed = np.bincount(drawn, minlength=len(GLUE_SIZES))
        assert scipy.stats.chisquare(observed, expected).pvalue > 1e-3


def test_round_robin_is_a_fixed_cycle_also_across_groups():
    sampler = make_sampler(schedule="round_robin", groups=2)
    drawn = np.concatenate([sampler.draw(step).trained_ids for step in range(6)])
    np.testing.assert_array_equal(drawn, np.arange(12) % 3)


@pytest.mark.parametrize("schedule", SAMPLING_SCHEDULES)
def test_any_step_can_be_asked_for_alone(schedule):
    in_order = make_sampler(schedule=schedule, groups=2)
    draws = [in_order.draw(step) for step in range(400)]
    for step in (399, 0, 250, 17):
        alone = make_sampler(schedule=schedule, groups=2).draw(step)
        np.testing.assert_array_equal(alone.trained_ids, draws[step].trained_ids)
        np.testing.assert_array_equal(alone.examples, draws[step].examples)


def test_each_task_passes_through_all_its_data_reshuffled():
    sampler = make_sampler(groups=2)
    seen: list[list[int]] = [[] for _ in sampler.sizes]
    for step in range(400):
        for task, examples in zip(*sampler.draw(step), strict=True):
            seen[task] += examples.tolist()
    for size, stream in zip(sampler.sizes, seen, strict=True):
        passes = [stream[i : i + size] for i in range(0, len(stream) - size + 1, size)]
        assert len(passes) >= 2
        assert all(sorted(one) == list(range(size)) for one in passes)
        assert passes[0] != passes[1]


def test_the_seed_changes_tasks_and_examples():
    a, b = make_sampler(seed=0), make_sampler(seed=1)
    draws = [(a.draw(step), b.draw(step)) for step in range(100)]
    assert any(x.trained_ids[0] != y.trained_ids[0] for x, y in draws)
    same_task = [(x, y) for x, y in draws if x.trained_ids[0] == y.trained_ids[0]]
    assert any((x.examples != y.examples).any() for x, y in same_task)


def test_a_longer_run_at_constant_probabilities_begins_alike():
    short = make_sampler(schedule="sqrt", epochs=1)
    long = make_sampler(schedule="sqrt", epochs=3)
    for step in range(100):
        np.testing.assert_array_equal(short.draw(step).examples, long.draw(step).examples)


def test_wrong_input_is_refused():
    with pytest.raises(UserError, match="known are round_robin"):
        task_probabilities((1, 2), "anealed", 1, 1)
    with pytest.raises(UserError, match="task 1 has no training examples"):
        task_probabilities((1, 0), "sqrt", 1, 1)
    with pytest.raises(ValueError, match="epoch 3"):
        task_probabilities((1, 2), "sqrt", 3, 2)
    with pytest.raises(ValueError, match="step 400"):
        make_sampler().draw(400)
