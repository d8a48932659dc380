"""Interquartile means against rliable and by hand; scores of different references are never mixed."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from namm_transfer.errors import DataError
from namm_transfer.eval.offline_rl.report import interquartile_mean, markdown, summarise
from namm_transfer.eval.results import Row


def test_the_middle_half_is_averaged() -> None:
    found = interquartile_mean([[100.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, -100.0]])
    assert found.value == pytest.approx(3.5)  # of 2, 3, 4, 5
    assert found.low < 3.5 < found.high
    assert found.units == 8
    assert interquartile_mean([[100.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, -100.0]]).value == pytest.approx(3.5)


def test_a_task_with_more_episodes_weighs_as_much_as_another() -> None:
    few, many = [0.0, 1.0, 2.0, 3.0], [10.0 + i % 4 for i in range(400)]
    found = interquartile_mean([few, many])
    assert found.value == pytest.approx(interquartile_mean([few, [10.0, 11.0, 12.0, 13.0]]).value)
    assert found.units == 404
    for size in range(1, 12):
        values = np.random.default_rng(size).normal(size=size)
        assert interquartile_mean([values.tolist()]).value == pytest.approx(stats.trim_mean(values, 0.25))


def test_intervals_agree_with_rliable() -> None:
    """rliable draws runs (rows of its matrix) anew within each task (a column)."""
    pytest.importorskip("rliable")
    from rliable import library, metrics

    scores = np.random.default_rng(0).gamma(2.0, 20.0, size=(24, 3)) * np.array([1.0, 2.0, 0.5])
    points, intervals = library.get_interval_estimates(
        {"x": scores}, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=1000, random_state=np.random.RandomState(0)
    )
    found = interquartile_mean(scores.T.tolist(), resamples=1000)
    assert found.value == pytest.approx(points["x"][0])
    assert (found.low, found.high) == pytest.approx(intervals["x"][:, 0], abs=0.2 * found.half_width)


def test_strata_are_drawn_apart() -> None:
    """Two tasks on scales far apart: pooled, draws would also differ in how many come from which."""
    rng = np.random.default_rng(1)
    low, high = rng.normal(0, 1, 20).tolist(), rng.normal(1000, 1, 20).tolist()
    apart, pooled = interquartile_mean([low, high]), interquartile_mean([low + high])
    assert apart.value == pytest.approx(pooled.value)
    assert apart.half_width < 0.1 * pooled.half_width


def test_the_interval_is_repeatable_and_undefined_is_nan() -> None:
    values = [np.random.default_rng(2).normal(size=10).tolist()]
    assert interquartile_mean(values) == interquartile_mean(values)
    assert math.isnan(interquartile_mean([]).value)
    one = interquartile_mean([[3.0]])
    assert one.value == 3.0
    assert math.isnan(one.low)
    with pytest.raises(DataError, match="finite"):
        interquartile_mean([[1.0, math.nan]])


def episode(policy: str, score: float, unit: int, task: str = "offline_rl/hopper-medium", source: str = "D4RL") -> Row:
    return Row(
        task=task,
        policy=policy,
        unit=str(unit),
        cluster=str(unit),
        seed=0,
        status="ok",
        metric="return_raw",
        score=score,
        detail={"score_percent": score / 10, "references": source},
    )


def rows() -> list[Row]:
    return [
        episode(policy, 100.0 * unit + shift, unit, task)
        for task in ("offline_rl/hopper-medium", "offline_rl/walker2d-medium")
        for policy, shift in (("full", 50.0), ("namm", 0.0))
        for unit in range(8)
    ]


def test_summary_has_returns_and_scores_by_task_and_over_all() -> None:
    summary = summarise(rows(), ["full", "namm"])
    cell = summary["tasks"]["offline_rl/walker2d-medium"]["namm"]
    assert cell["iqm_return_raw"]["value"] == pytest.approx(350.0)
    assert cell["iqm_score_percent"]["value"] == pytest.approx(35.0)
    everything = summary["all"]["D4RL"]["full"]
    assert (everything["iqm_score_percent"]["value"], everything["tasks"]) == (pytest.approx(40.0), 2)
    text = markdown(summary)
    assert "| offline RL | full | namm |" in text
    assert "| offline_rl/hopper-medium, return_raw | 400 [" in text
    assert "| all tasks with references of D4RL, score_percent | 40.0 [" in text


def test_only_policies_that_have_every_task_are_compared_over_all() -> None:
    some = [row for row in rows() if (row.task, row.policy) != ("offline_rl/walker2d-medium", "namm")]
    summary = summarise(some, ["full", "namm"])
    assert [*summary["all"]["D4RL"]] == ["full"]
    text = markdown(summary)
    assert "| all tasks with references of D4RL, score_percent | 40.0 [" in text
    assert text.splitlines()[-3].endswith("] | – |")
    assert "only policies that have every one of them" in text
    assert "only policies" not in markdown(summarise([row for row in some if "hopper" in row.task]))


def test_scores_of_other_references_are_kept_apart() -> None:
    own = [episode("full", 10.0 * unit, unit, "offline_rl/hopper", "the host's own") for unit in range(4)]
    summary = summarise([*rows(), *own])
    assert {source: sorted(columns) for source, columns in summary["all"].items()} == {
        "D4RL": ["full", "namm"],
        "the host's own": ["full"],
    }
    assert summary["all"]["D4RL"]["full"]["tasks"] == 2
    mixed = replace(rows()[0], detail={"score_percent": 1.0, "references": "the host's own"})
    with pytest.raises(DataError, match="cannot be averaged"):
        summarise([*rows(), mixed])
    other = [replace(row, policy="h2o", detail={"score_percent": 1.0, "references": "Minari"}) for row in rows()]
    with pytest.raises(DataError, match="hopper-medium: scores against the references of D4RL and of Minari"):
        summarise([*rows(), *other])


def test_other_tasks_and_rows_without_scores_have_no_section() -> None:
    assert summarise([replace(row, metric="accuracy") for row in rows()]) == {}
    assert markdown({}) == ""
    bare = summarise([replace(row, detail={}) for row in rows()])
    assert bare["all"] == {}
    assert "score_percent |" not in markdown(bare)
