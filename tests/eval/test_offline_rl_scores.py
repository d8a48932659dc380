"""Scores: D4RL's table, and that scales are never mixed."""

from __future__ import annotations

import math

import pytest

from namm_transfer.errors import DataError
from namm_transfer.eval.offline_rl.scores import (
    D4RL_REFERENCES,
    ReferenceReturns,
    d4rl_references,
    score_fraction,
    score_percent,
    summarise_returns,
)


@pytest.mark.parametrize(
    ("env_id", "low", "high"),
    [
        ("Hopper-v4", -20.272305, 3234.3),
        ("HalfCheetah-v4", -280.178953, 12135.0),
        ("Walker2d-v4", 1.629008, 4592.3),
    ],
)
def test_d4rl_table(env_id: str, low: float, high: float) -> None:
    references = d4rl_references(env_id)
    assert score_fraction(low, env_id, references) == 0.0
    assert score_fraction(high, env_id, references) == 1.0
    assert score_percent((low + high) / 2, env_id, references) == pytest.approx(50.0)


def test_table_agrees_with_the_d4rl_package() -> None:
    infos = pytest.importorskip("d4rl.infos", reason="d4rl is optional", exc_type=ImportError)
    for env_id, references in D4RL_REFERENCES.items():
        name = f"{env_id.split('-')[0].lower()}-medium-v2"
        assert references.random == pytest.approx(infos.REF_MIN_SCORE[name], abs=1e-6)
        assert references.good == pytest.approx(infos.REF_MAX_SCORE[name], abs=1e-6)


def test_d4rl_has_no_references_for_v5() -> None:
    with pytest.raises(DataError, match="Hopper-v5"):
        d4rl_references("Hopper-v5")


def test_references_of_another_version_are_refused() -> None:
    own = ReferenceReturns("Hopper-v5", 10.0, 3000.0, "the host's own")
    assert score_fraction(10.0, "Hopper-v5", own) == 0.0
    for env_id, references in (("Hopper-v4", own), ("Hopper-v5", d4rl_references("Hopper-v4"))):
        with pytest.raises(DataError, match="different rewards"):
            score_fraction(1000.0, env_id, references)


@pytest.mark.parametrize(("random", "good"), [(5.0, 5.0), (6.0, 5.0), (math.nan, 5.0)])
def test_impossible_references_are_refused(random: float, good: float) -> None:
    with pytest.raises(DataError, match="above the random one"):
        ReferenceReturns("Hopper-v5", random, good, "a test")


def test_summary_is_nan_where_undefined() -> None:
    summary = summarise_returns([1.0, 2.0, 3.0])
    assert (summary.mean, summary.std, summary.n) == (2.0, 1.0, 3)
    one, none = summarise_returns([4.0]), summarise_returns([])
    assert one.mean == 4.0
    assert math.isnan(one.std)
    assert one.n == 1
    assert math.isnan(none.mean)
    assert math.isnan(none.std)
    assert none.n == 0
