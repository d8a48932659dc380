"""One table over studies: ratios within a data set, data sets of the same weight, intervals that add in squares."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from namm_transfer.errors import DataError
from namm_transfer.eval.offline_rl.over_data import main, over_data, read_study
from namm_transfer.eval.results import Row, RunFolder
from namm_transfer.eval.statistics import normalised


def returns(seed: int, count: int, **factors: float) -> dict[str, dict[str, float]]:
    """Columns whose returns are multiples of the window's, with some noise."""
    rng = np.random.default_rng(seed)
    window = rng.uniform(1000, 3000, count)
    return {
        name: {str(i): float(value) for i, value in enumerate(factor * window + rng.normal(0, 200, count))}
        for name, factor in {"window": 1.0, **factors}.items()
    }


def test_data_sets_have_the_same_weight() -> None:
    studies = {
        "few": returns(0, 20, **{"namm-0.5": 0.5, "h2o": 2.0, "only-here": 1.0}),
        "many": returns(1, 200, **{"namm-0.5": 1.5, "h2o": 1.0}),
    }
    found = over_data(studies)
    assert [*found] == sorted(found, key=lambda column: -found[column]["ratio"].value)
    assert set(found) == {"window", "namm-0.5", "h2o"}
    apart = []
    for name, study in studies.items():
        units = [*study["window"]]
        estimate = normalised([study["h2o"][u] for u in units], [study["window"][u] for u in units], units)
        apart.append(estimate)
        assert found["h2o"]["data"][name] == estimate.value
    whole = found["h2o"]["ratio"]
    assert whole.value == pytest.approx(np.mean([one.value for one in apart]))
    assert whole.half_width == pytest.approx(math.hypot(*(one.half_width for one in apart)) / 2)
    difference = found["namm-0.5"]["ratio"].value - whole.value
    assert found["h2o"]["behind"].value == pytest.approx(difference)
    assert found["namm-0.5"]["behind"].value == found["namm-0.5"]["behind"].half_width == 0.0
    assert (found["window"]["ratio"].value, found["window"]["ratio"].half_width) == (1.0, 0.0)


def write(folder: Path, task: str, columns: dict[str, dict[str, float]]) -> Path:
    for column, scores in columns.items():
        run = RunFolder.open(folder / column, {"column": column})
        for unit, score in scores.items():
            run.append(Row(task, column, unit, unit, 0, "ok", "return_raw", score))
    return folder


def test_folders_of_studies_become_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write(tmp_path / name, name, returns(i, 9, **{"namm-0.5": 1.1})) for i, name in enumerate("ab")]
    main(folders, tmp_path / "out")
    text = (tmp_path / "out" / "table.md").read_text()
    assert text.splitlines()[0] == "| policy | a | b | mean, of window | namm-0.5 ahead by |"
    assert (
        "| window | 1.00 | 1.00 | 1.00 [1.00, 1.00] | +0.1" in text and "| policy | a | b |" in capsys.readouterr().out
    )
    stored = json.loads((tmp_path / "out" / "table.json").read_text())
    assert set(stored["namm-0.5"]["data"]) == {"a", "b"}


def test_what_is_no_study_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds rows of 0 tasks"):
        read_study(tmp_path)
    two = write(write(tmp_path, "a", {"full": {"0": 1.0}}), "b", {"other": {"0": 1.0}})
    with pytest.raises(DataError, match=r"holds rows of 2 tasks \(a, b\)"):
        read_study(two)
    with pytest.raises(DataError, match="x has no column 'namm-0.5'; it has window"):
        over_data({"x": returns(0, 4)})
    torn = returns(0, 4, **{"namm-0.5": 1.0})
    del torn["namm-0.5"]["3"]
    with pytest.raises(DataError, match="lacks the episode '3', which 'window' has"):
        over_data({"x": torn})
