"""Policies are paired with the full cache and with the reference, unit by unit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from namm_transfer.errors import DataError
from namm_transfer.eval.compare import compare, curves, markdown
from namm_transfer.eval.results import Row


def rows(column: str, scores: list[float], budget: float | None = 0.5) -> list[Row]:
    return [
        Row(
            task="language/test",
            policy=column,
            unit=str(i),
            cluster=f"d{i // 2}",
            seed=0,
            status="ok",
            metric="log_likelihood_per_token",
            score=score,
            kept_at_updates=None if column == "full" or i == 3 else 0.5,  # short units end before a decision
            budget=budget,
            detail={"kind": "needles" if i % 2 else "recall", "token_accuracy": 0.25},
        )
        for i, score in enumerate(scores)
    ]


def test_losses_are_paired_and_clustered() -> None:
    full = rows("full", [-1.0, -2.0, -3.0, -4.0], budget=None)
    namm, h2o = rows("namm-0.5", [-1.5, -2.5, -3.5, -4.5]), rows("h2o-0.5", [-2.0, -3.0, -5.0, -6.0])
    threshold = rows("namm", [-1.0, -2.0, -3.0, -5.0], budget=None)
    lines = compare([*full, *h2o, *namm, *threshold])
    assert [line.policy for line in lines] == ["namm-0.5", "h2o-0.5", "namm", "full"]
    first, second, third, last = lines
    assert (first.difference.value, first.difference.low, first.difference.high) == pytest.approx((-0.5, -0.5, -0.5))
    assert first.of_full.value == pytest.approx(1.0)  # the same accuracy as the full cache's in these rows
    assert first.ahead is None
    assert third.ahead is None
    assert last.ahead is None
    assert (last.difference.value, last.score.value) == (0.0, -2.5)
    assert second.ahead is not None
    assert second.ahead.value == pytest.approx(1.0)  # 0.5 in one document, 1.5 in the other
    # two clusters, residuals of -1 and +1 over four units: t(1) = 12.706, standard error sqrt(2 * 2) / 4
    assert second.ahead.high - second.ahead.value == pytest.approx(12.706 * 0.5, rel=1e-3)
    assert third.by_kind == pytest.approx({"recall": 0.0, "needles": -0.5})
    table = markdown(lines)
    assert "| h2o-0.5 | 0.5 | 0.500 | -4.00 | 1.00 [1.00, 1.00] | -1.50 [" in table
    assert "| namm |  | 0.500 |" in table


def test_a_score_is_a_fraction_of_itself_and_a_baseline_has_no_rival() -> None:
    def scored(column: str, values: list[float], kept: float | None) -> list[Row]:
        return [
            replace(row, kept_at_updates=kept, detail={"family": "count"}, metric="accuracy")
            for row in rows(column, values, budget=None)
        ]

    full, window = scored("full", [1.0, 1.0, 1.0, 0.0], 1.0), scored("window", [1.0, 0.0, 1.0, 1.0], None)
    namm = scored("namm", [1.0, 1.0, 0.0, 0.0], 0.3)
    first, second, _ = compare([*full, *window, *namm])
    assert (first.policy, second.policy) == ("window", "namm")
    assert second.of_full.value == pytest.approx(2 / 3)
    assert first.ahead is None  # a baseline has a memory of its own: there is no budget at which they meet
    assert first.by_kind == {"count": 0.0}


def test_curves_are_drawn(tmp_path: Path) -> None:
    full = rows("full", [-1.0, -2.0, -3.0, -4.0], budget=None)
    lines = compare([*full, *rows("h2o-0.5", [-2.0, -3.0, -5.0, -6.0]), *rows("namm", [-1.0] * 4, budget=None)])
    curves(lines, "a title", "score", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_column_without_decisions_has_no_kept_fraction() -> None:
    full, h2o = rows("full", [-1.0, -2.0], budget=None), rows("h2o-0.5", [-2.0, -3.0])
    line, _ = compare([*full, *(replace(row, kept_at_updates=None) for row in h2o)])
    assert line.kept is None
    assert "| h2o-0.5 | 0.5 | – |" in markdown([line])
    half, _ = compare([*full, replace(h2o[0], kept_at_updates=None), h2o[1]])
    assert half.kept == 0.5


def test_rows_that_do_not_pair_are_refused() -> None:
    full = rows("full", [-1.0, -2.0], budget=None)
    with pytest.raises(DataError, match="h2o"):
        compare([*full, *rows("h2o", [-1.0])])
    with pytest.raises(DataError, match="full"):
        compare(rows("h2o", [-1.0]))
