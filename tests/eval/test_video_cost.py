"""Accuracy, work and time of encoders under memories: rows that survive a kill, and a table that adds them up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from namm_transfer.errors import ConfigError
from namm_transfer.eval.video_classification import cost


def run(out: Path, **changed: str) -> list[dict]:
    settings = {"hosts": "vivit", "policies": "streaming", "budgets": "0.25,1.0", "clips": 2} | changed
    cost.main(out, update_interval=64, namm="default", threads=1, **settings)
    return json.loads((out / "table.json").read_text())


def test_columns_are_measured_and_a_killed_run_goes_on(tmp_path: Path) -> None:
    lines = {line["column"]: line for line in run(tmp_path / "out")}
    assert set(lines) == {
        "full",
        *(f"streaming, {mode}, {budget}" for mode in ("layer by layer", "carried") for budget in (0.25, 1.0)),
    }
    assert lines["full"]["work"] == lines["streaming, carried, 1.0"]["work"] == 1.0
    assert lines["streaming, carried, 0.25"]["work"] < lines["streaming, layer by layer, 0.25"]["work"] < 0.5
    assert lines["streaming, carried, 0.25"]["kept"] == pytest.approx(0.25, abs=0.01)
    assert lines["full"]["accuracy"] == lines["streaming, layer by layer, 1.0"]["accuracy"]
    assert all(line["clips"] == 2 and line["time"][1] <= line["time"][0] <= line["time"][2] for line in lines.values())
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")

    file = tmp_path / "out" / "rows.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) * 3 // 4])  # in the second clip, amid a line
    again = {line["column"]: line for line in run(tmp_path / "out")}
    assert {name: line["accuracy"] for name, line in again.items()} == {n: x["accuracy"] for n, x in lines.items()}
    assert all(line["clips"] == 2 for line in again.values())
    before = file.read_bytes()
    run(tmp_path / "out")
    assert file.read_bytes() == before
    with pytest.raises(ConfigError, match="other values of budgets"):
        run(tmp_path / "out", budgets="0.5")
