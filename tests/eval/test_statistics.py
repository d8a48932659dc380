"""Intervals against independent oracles: an OLS sandwich written out, scipy's t interval, the bootstrap, coverage."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from namm_transfer.errors import DataError
from namm_transfer.eval.statistics import difference, mean, normalised, ratio

FINITE = st.floats(-1e3, 1e3)
SAMPLES = st.lists(st.tuples(FINITE, st.integers(0, 5)), min_size=2, max_size=30)


def sandwich(values, clusters, confidence=0.95):
    """Mean and CR1 interval of a regression on a constant, clusters in a loop (Liang and Zeger, 1986)."""
    x, y = np.ones((len(values), 1)), np.array(values)
    bread = np.linalg.inv(x.T @ x)
    beta = bread @ x.T @ y
    meat = np.zeros((1, 1))
    names = sorted(set(clusters))
    for name in names:
        members = [i for i, cluster in enumerate(clusters) if cluster == name]
        score = x[members].T @ (y[members] - x[members] @ beta)
        meat += np.outer(score, score)
    n, g = len(values), len(names)
    variance = (bread @ meat @ bread * g / (g - 1) * (n - 1) / (n - 1)).item()
    return beta.item(), stats.t.interval(confidence, g - 1, beta.item(), math.sqrt(variance)) if variance else None


@given(SAMPLES)
def test_mean_equals_the_sandwich_of_a_regression_on_a_constant(sample):
    values, clusters = zip(*sample, strict=True)
    found = mean(values, clusters)
    assert found.value == pytest.approx(np.mean(values), abs=1e-9)
    if len(set(clusters)) == 1:
        assert math.isnan(found.low)
        assert math.isnan(found.high)
        return
    _, interval = sandwich(values, clusters)
    if interval:
        assert (found.low, found.high) == pytest.approx(interval, abs=1e-6)


@given(st.lists(FINITE, min_size=3, max_size=40).filter(lambda v: np.std(v) > 1e-3))
def test_clusters_of_one_give_the_textbook_t_interval(values):
    found = mean(values, range(len(values)))
    expected = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(SAMPLES, st.randoms())
def test_order_and_names_of_clusters_do_not_matter(sample, random):
    values, clusters = zip(*sample, strict=True)
    shuffled = list(sample)
    random.shuffle(shuffled)
    a, b = mean(values, clusters), mean(*zip(*[(v, f"clip {c}") for v, c in shuffled], strict=True))
    assert (a.value, a.low, a.high) == pytest.approx((b.value, b.low, b.high), abs=1e-8, nan_ok=True)


@given(SAMPLES, st.floats(-50, 50))
def test_a_constant_shift_is_a_difference_without_uncertainty(sample, shift):
    values, clusters = zip(*sample, strict=True)
    found = difference(np.add(values, shift), values, clusters)
    assert found.value == pytest.approx(shift, abs=1e-9)
    if found.clusters > 1:
        assert found.half_width == pytest.approx(0, abs=1e-9)


def test_repeating_every_unit_in_its_cluster_does_not_narrow_the_interval():
    rng = np.random.default_rng(0)
    values, clusters = rng.normal(size=20), np.arange(20)
    once, thrice = mean(values, clusters), mean(np.repeat(values, 3), np.repeat(clusters, 3))
    assert thrice.half_width == pytest.approx(once.half_width)
    assert mean(np.repeat(values, 3), range(60)).half_width < 0.7 * once.half_width


def test_pairing_takes_out_what_units_have_in_common():
    rng = np.random.default_rng(1)
    hardness = rng.normal(0, 10, size=50)
    full, less = hardness + rng.normal(size=50), hardness - 1 + rng.normal(size=50)
    found = difference(less, full, range(50))
    assert found.low < -1 < found.high
    assert found.half_width < 0.2 * mean(less, range(50)).half_width


def test_normalised_interval_agrees_with_a_cluster_bootstrap():
    rng = np.random.default_rng(2)
    clusters = np.repeat(np.arange(150), 4)
    level = rng.normal(10, 2, size=150)[clusters]
    reference, values = level + rng.normal(size=600), 0.8 * level + rng.normal(size=600)
    found = normalised(values, reference, clusters)
    picks = rng.integers(0, 150, size=(4000, 150))
    top, bottom = (v.reshape(150, 4).sum(1)[picks].sum(1) for v in (values, reference))
    assert found.value == pytest.approx(values.sum() / reference.sum())
    assert (found.low, found.high) == pytest.approx(
        np.quantile(top / bottom, [0.025, 0.975]), abs=0.1 * found.half_width
    )


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(3)
    clusters = np.repeat(np.arange(8), 5)
    covered = 0
    for _ in range(600):
        values = rng.normal(size=8)[clusters] + rng.normal(size=40)
        found = mean(values, clusters)
        covered += found.low <= 0 <= found.high
    assert 0.92 < covered / 600 < 0.98


def test_undefined_is_nan():
    empty = mean([], [])
    assert math.isnan(empty.value)
    assert math.isnan(empty.low)
    assert (empty.units, empty.clusters) == (0, 0)
    one = mean([1.0, 0.0], ["clip", "clip"])
    assert one.value == 0.5
    assert math.isnan(one.half_width)
    assert one.clusters == 1
    assert math.isnan(normalised([1.0, 2.0], [0.0, 0.0], "ab").value)
    assert math.isnan(normalised([1.0, 2.0], [-3.0, 1.0], "ab").value), "a fraction of a negative score means nothing"


def test_bad_input_is_refused():
    with pytest.raises(DataError, match="one value and one cluster"):
        ratio([1.0], [1.0, 2.0], ["a"])
    with pytest.raises(DataError, match="finite"):
        mean([math.nan, 1.0], ["a", "b"])
