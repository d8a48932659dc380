"""What candidates are worth, and how many samples it takes to know."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr

from namm_transfer.errors import DataError
from namm_transfer.evolution.config import EvolutionConfig
from namm_transfer.evolution.fitness import agreement, mean_kept, samples_due, standardised, utilities
from namm_transfer.evolution.readers import Outcome


def outcome(difference: list[float], kept: list[float], budget: float | None = 0.3) -> Outcome:
    return Outcome("needles", budget, np.array(difference), -1.0, np.array(kept))


def test_every_sample_has_the_same_say() -> None:
    order = np.array([0.0, 1.0, 2.0, 3.0])
    steep, gentle = -10 * order, 0.1 * order
    np.testing.assert_allclose(standardised(np.stack([steep, gentle])), np.zeros(4), atol=1e-12)
    assert (np.diff(standardised(np.stack([steep, gentle, gentle]))) > 0).all()


def test_a_sample_that_tells_candidates_apart_by_rounding_alone_counts_little() -> None:
    rounding, real = np.array([[1e-4, 0, 0, 0], [0, 0, 0, 1.0]])
    fitness = standardised(np.stack([rounding, real]))
    assert fitness.argmax() == 3
    assert fitness[0] - fitness[1] < 0.02


def test_only_what_a_candidate_may_choose_is_priced() -> None:
    ranked, free = outcome([-1.0, -2.0], [0.3, 0.3]), outcome([-1.0, -2.0], [1.0, 0.25], budget=None)
    np.testing.assert_allclose(
        utilities([ranked, free], price=2.0), [[-1.0, -2.0], [-3.0, -2.125]]
    )  # 2 x 1, and 2 x a sixteenth


def test_a_value_that_is_not_finite_is_the_worst_of_its_sample() -> None:
    found = utilities([outcome([-1.0, np.nan, -np.inf, -3.0], [0.3] * 4)], price=1.0)
    np.testing.assert_allclose(found, [[-1.0, -3.0, -3.0, -3.0]])
    hopeless = outcome([np.nan, np.inf], [0.3, 0.3])
    np.testing.assert_allclose(utilities([hopeless, outcome([-1.0, -2.0], [0.3, 0.3])], price=1.0), [[-1.0, -2.0]])
    with pytest.raises(DataError, match="none of 1 samples gave any candidate a finite value"):
        utilities([hopeless], price=1.0)


def test_agreement_of_signal_and_of_noise() -> None:
    order, noise = np.arange(32.0), np.random.default_rng(0).normal(size=(200, 16, 32))
    assert agreement(np.tile(order, (6, 1))) == pytest.approx(1.0)
    assert abs(np.mean([agreement(one) for one in noise])) < 0.05
    assert agreement(np.zeros((6, 32))) == 0.0
    # every other sample of another sort, with an order of its own: chance halves hold some of both
    other = np.random.default_rng(1).permutation(order)
    turns = np.stack([order, other] * 8)
    by_number = float(spearmanr(turns[::2].mean(0), turns[1::2].mean(0)).statistic)
    assert agreement(turns) > by_number + 0.3


def test_samples_grow_while_selection_is_noise() -> None:
    config = EvolutionConfig(samples=10, samples_max=40, agreement=0.3)
    assert samples_due(config, []) == 10
    assert samples_due(config, [0.9] * 50) == 10
    assert 10 < samples_due(config, [0.0] * 5) < samples_due(config, [0.0] * 8) < 40
    assert samples_due(config, [0.0] * 50) == 40
    assert samples_due(config, [0.0] * 5 + [0.9] * 50) == samples_due(config, [0.0] * 5 + [0.9] * 10)
    assert samples_due(replace(config, agreement=-1.0), [0.0] * 50) == 10


def test_a_sample_without_a_decision_counts_in_no_mean() -> None:
    rows = [outcome([0.0, 0.0], kept) for kept in ([0.2, 0.4], [np.nan, np.nan], [0.4, 0.6])]
    np.testing.assert_allclose(mean_kept(rows), [0.3, 0.5])
    with pytest.raises(DataError, match="no decision was taken in any of 2 samples"):
        mean_kept([outcome([0.0], [np.nan])] * 2)
