"""The knee and the margin on numbers whose answer is known."""

import numpy as np
import pytest
import torch

from sage.evaluation import interval
from sage.evaluation.bootstrap import Estimate
from sage.evaluation.knee import Measurement, find_knee, within

GROUPS = [[2 * k, 2 * k + 1] for k in range(30)]
BASE = np.random.default_rng(0).normal(0.5, 0.2, 60)  # prompts differ by much, methods by little


def constant(shift: float, up: bool = True) -> Measurement:
    """All prompts better or worse by the same: the interval of a difference has no width."""
    return Measurement(BASE + shift, GROUPS, up)


def mean() -> float:
    return float(BASE.mean())


def test_the_smallest_step_count_within_the_margin_is_the_knee():
    lost = {20: 0.0, 10: -0.01, 8: -0.02, 6: -0.04, 4: -0.2}
    measured = {steps: {"score": constant(shift)} for steps, shift in lost.items()}
    for margin, knee in ((0.05, 8), (0.1, 6), (0.5, 4), (0.005, 20)):
        assert find_knee(measured, margin * 0.5 / mean()).steps == knee
    assert find_knee(measured, 0.05).best == {"score": 20}


def test_for_a_distance_less_is_better():
    measured = {steps: {"frechet": constant(shift, up=False)} for steps, shift in {20: 0.0, 10: 0.01, 5: 0.2}.items()}
    knee = find_knee(measured, 0.05)
    assert knee.steps == 10 and knee.best == {"frechet": 20}
    difference, fits = knee.table[5]["frechet"]
    assert not fits and difference.value == pytest.approx(0.2) and difference.low == pytest.approx(difference.high)


def test_every_metric_counts():
    """Ten steps are enough for one metric, twenty for both."""
    measured = {
        30: {"score": constant(0.0), "identification": constant(0.0)},
        20: {"score": constant(0.0), "identification": constant(-0.01)},
        10: {"score": constant(0.0), "identification": constant(-0.2)},
    }
    assert find_knee(measured, 0.05).steps == 20


def test_none_where_no_step_count_is_within_all_margins():
    """One metric wants many steps, another few: no knee, and none is invented."""
    measured = {steps: {"score": constant(shift), "distance": constant(shift, up=False)} for steps, shift in ((20, 0.2), (5, 0.0))}
    knee = find_knee(measured, 0.05)
    assert knee.steps is None and knee.best == {"score": 20, "distance": 5}
    assert knee.as_json()["steps"] is None


def test_an_uncertain_difference_is_not_within():
    """The same mean, but another picture by picture: the interval is wider than the margin."""
    noisy = Measurement(BASE + np.random.default_rng(1).permutation(np.tile([0.3, -0.3], 30)), GROUPS)
    measured = {20: {"score": constant(0.02)}, 5: {"score": noisy}}
    assert find_knee(measured, 0.05).steps == 20
    assert find_knee(measured, 0.9).steps == 5


def test_the_difference_is_paired():
    difference = constant(0.01).minus(constant(0.0))
    assert difference.low == pytest.approx(0.01) and difference.high == pytest.approx(0.01)
    alone = constant(0.01).estimate()
    assert alone.high - alone.low > 0.05


def test_equal_bests_take_the_least_steps():
    knee = find_knee({steps: {"score": constant(0.0)} for steps in (30, 5, 12)}, 0.05)
    assert knee.steps == 5 and knee.best == {"score": 5}


def test_a_figure_is_computed_once_for_the_same_rows():
    asked = []

    def figure(rows):
        asked.append(rows)
        return float(torch.tensor(BASE)[rows].mean())

    measurement = Measurement(figure, GROUPS, resamples=20)
    first, again = measurement.estimate(), measurement.estimate()
    assert first == again and len(asked) == 21
    other = Measurement(lambda rows: 0.0, GROUPS, resamples=20)
    assert measurement.minus(other).value == pytest.approx(first.value) and len(asked) == 21
    assert first == interval(lambda rows: float(torch.tensor(BASE)[rows].mean()), GROUPS, resamples=20)


@pytest.mark.parametrize(("low", "high", "up", "fits"), [
    (-0.05, 0.2, True, True), (-0.051, 0.2, True, False), (-9, 0.05, False, True), (-9, 0.051, False, False),
])  # fmt: skip
def test_within_is_one_sided(low, high, up, fits):
    assert within(Estimate(0.0, low, high, 10, 5, 10), -1.0, up, 0.05) is fits


@pytest.mark.parametrize("measured", [{}, {5: {}}])
def test_nothing_to_go_by_is_refused(measured):
    with pytest.raises(ValueError, match="find_knee: measured must hold"):
        find_knee(measured, 0.05)
