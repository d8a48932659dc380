"""The same units under every policy, the rules at NAMM's measured budget, and nothing evaluated twice."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from namm_transfer.errors import BudgetError, CheckpointError, ConfigError
from namm_transfer.eval.results import Row, RunFolder
from namm_transfer.eval.runner import Run, matched_budget
from namm_transfer.eval.transfer import Interrupted, transfer
from namm_transfer.eval.workers import build_policy
from namm_transfer.network import NAMM, NUM_PARAMETERS

HERE = Path(__file__).parent


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    NAMM.from_vector(torch.zeros(NUM_PARAMETERS)).save_pretrained(tmp_path / "namm")
    return {
        "tasks": {"one": {"_target_": "fake_task.FakeTask", "name": "fake"}},
        "policies": {
            "h2o": {"name": "h2o", "budget": "matched"},
            "full": {"name": "full"},
            "namm": {"name": "namm", "namm": str(tmp_path / "namm"), "budget": None},
            "streaming": {"name": "streaming", "budget": 0.5},
            "window": {"name": "window"},
        },
        "seed": 0,
        "executor": {"threads": None},
    }


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


def test_every_policy_meets_the_same_units_and_the_rules_get_the_measured_budget(config, console, tmp_path):
    run = Run(config, tmp_path / "run")
    run(console)
    rows = run.folder.rows()
    units = {p: [(r.unit, r.cluster, r.seed) for r in rows if r.policy == p] for p in config["policies"]}
    assert units["full"] == units["namm"] == units["h2o"] == units["streaming"] == units["window"]
    assert len(units["full"]) == 6
    matched = [(r.budget, r.kept_at_updates) for r in rows if r.policy == "h2o"]
    assert matched == [(pytest.approx(0.25), pytest.approx(0.25))] * 6, "mean of NAMM's 0.2 and 0.3"
    assert {r.budget for r in rows if r.policy == "streaming"} == {0.5}
    order = list(dict.fromkeys(r.policy for r in rows))
    assert order.index("h2o") > order.index("namm")


def test_a_baseline_runs_only_on_tasks_that_have_it(config, console, tmp_path):
    config["tasks"]["two"] = {"_target_": "fake_task.FakeTask", "name": "other", "baselines": []}
    run = Run(config, tmp_path / "run")
    run(console)
    assert {r.task for r in run.folder.rows() if r.policy == "window"} == {"fake"}
    assert len(run.folder.rows()) == len(run.plan) == 6 * 5 + 6 * 4


def test_a_unit_without_a_decision_counts_in_no_mean(config, console, tmp_path):
    config["tasks"]["one"] |= {"clips": 3, "undecided": ["clip0", "clip2"]}
    summary = transfer(config, tmp_path / "run", console)
    rows = RunFolder(tmp_path / "run").rows()
    assert {r.kept_at_updates for r in rows if r.policy == "namm" and r.cluster != "clip1"} == {None}
    assert [r.budget for r in rows if r.policy == "h2o"] == [pytest.approx(0.25)] * 6, "of the two units of clip1"
    assert summary["fake"]["namm"]["kept_at_updates"] == pytest.approx(0.25)


def test_a_policy_that_never_got_to_decide_is_refused_now_and_when_resumed(config, console, tmp_path):
    config["tasks"]["one"] |= {"undecided": ["clip0", "clip1", "clip2"], "model": {"update_interval": 2048}}
    config["policies"] = {column: config["policies"][column] for column in ("full", "namm", "h2o")}
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"'namm' took no decision in any of 6 units.* 2048.* 100 to 100 tokens"):
            transfer(config, tmp_path / "run", console)
    assert {r.policy for r in RunFolder(tmp_path / "run").rows()} == {"full", "namm"}, "the full cache may idle"


def test_the_matched_budget_needs_a_decision():
    def row(unit, kept, status="ok"):
        score = 1.0 if status == "ok" else None
        return Row("t", "namm", unit, unit, 0, status, "m", score, kept_at_updates=kept)

    assert matched_budget([row("a", 0.2), row("b", 0.4), row("c", None)], "t") == pytest.approx(0.3)
    assert matched_budget([row("a", None, "undecodable")], "t") == 1.0
    with pytest.raises(ConfigError, match="no decision in 2 units"):
        matched_budget([row("a", None), row("b", None), row("c", None, "undecodable")], "t")


def test_undecodable_units_are_counted_and_never_scored(config, console, tmp_path):
    config["tasks"]["one"]["undecodable"] = "clip1"
    summary = transfer(config, tmp_path / "run", console)
    rows = RunFolder(tmp_path / "run").rows()
    lost = [r for r in rows if r.status == "undecodable"]
    assert len(lost) == 2 * 5
    assert all(r.score is None and "no readable video" in r.error for r in lost)
    assert all((c["units"], c["undecodable"]) == (4, 2) for c in summary["fake"].values())
    assert "2 undecodable" in console.file.getvalue()


def test_all_undecodable_is_reported_without_a_score(config, console, tmp_path):
    config["tasks"]["one"] |= {"undecodable": "clip0", "clips": 1}
    summary = transfer(config, tmp_path / "run", console)
    assert summary["fake"]["full"]["units"] == 0
    stored = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert stored["fake"]["full"]["score"]["value"] is None


def test_interrupt_keeps_rows_says_how_to_resume_and_resuming_completes(config, console, tmp_path, monkeypatch):
    whole = transfer(config, tmp_path / "whole", console)
    log = tmp_path / "log"
    config["tasks"]["one"]["interrupt_after"] = 4
    with pytest.raises(Interrupted, match=r"4 of 30 results are kept.*transfer --resume .*run"):
        transfer(config, tmp_path / "run", console)
    # The switch is part of the configuration, so the folder is made that of the run without it.
    (tmp_path / "run" / "config.yaml").write_text((tmp_path / "whole" / "config.yaml").read_text())
    del config["tasks"]["one"]["interrupt_after"]
    monkeypatch.setenv("FAKE_TASK_LOG", str(log))
    resumed = transfer(config, tmp_path / "run", console)
    assert log.read_text().splitlines()[0].endswith(" 2"), "two of the first policy's six units were left"
    for cells in (*whole.values(), *resumed.values()):
        for cell in cells.values():
            cell.pop("seconds")
    assert resumed == whole
    assert len(json.loads((tmp_path / "run" / "provenance.json").read_text())["starts"]) == 2


def test_a_killed_process_loses_nothing_that_was_finished(config, console, tmp_path):
    config["tasks"]["one"]["pause"] = 0.05
    code = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
from pathlib import Path
from rich.console import Console
from namm_transfer.eval.transfer import transfer
transfer({config!r}, Path({str(tmp_path / "run")!r}), Console())
"""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code], stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    lines = tmp_path / "run" / "rows.jsonl"
    deadline = time.monotonic() + 240
    while (not lines.is_file() or lines.read_bytes().count(b"\n") < 8) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = RunFolder(tmp_path / "run").rows()
    assert 8 <= len(before) < 30
    transfer(config, tmp_path / "run", console)
    after = RunFolder(tmp_path / "run").rows()
    assert after[: len(before)] == before
    assert len(after) == len({r.key for r in after}) == 30


def test_nothing_is_written_when_the_configuration_is_bad(config, tmp_path):
    bad = [
        ({"policies": {"h2o": {"name": "h2o", "budget": 1.5}}}, BudgetError, "must lie in"),
        ({"policies": {"h2o": {"name": "h2o", "budget": "matched"}}}, ConfigError, "needs a column 'namm'"),
        ({"policies": {"x": {"name": "windows"}}}, ConfigError, "unknown policy 'windows'"),
        ({"policies": {"x": {"budget": 0.5}}}, ConfigError, "policies.x has no name"),
        ({"policies": {"h2o": None}}, ConfigError, "policies.h2o is None; expected settings"),
        (
            {"policies": {"namm": {**config["policies"]["namm"], "budget": "matched"}}},
            ConfigError,
            "policies.namm.budget is 'matched'",
        ),
        ({"tasks": {"one": None}}, ConfigError, "tasks.one is None; expected settings"),
        ({"tasks": {"one": {"name": "fake"}}}, ConfigError, "there is no _target_"),
        ({"executor": {"device": "foo", "threads": None}}, ConfigError, "device is 'foo'"),
        ({"executor": {"device": "meta", "threads": None}}, ConfigError, "device is 'meta'"),
        ({"executor": {"device": "cpu", "threads": 0}}, ConfigError, "threads is 0"),
        ({"executor": {"device": "cpu", "threads": "two"}}, ConfigError, "threads is 'two'"),
        ({"policies": {"namm": {"name": "namm", "namm": str(tmp_path / "none")}}}, CheckpointError, "no NAMM"),
        ({"tasks": {"one": {"_target_": "fake_task.FakeTask", "clips": 0}}}, ConfigError, "clips is 0"),
        ({"tasks": {"one": {"_target_": "fake_task.NoTask"}}}, ConfigError, "cannot build the task"),
        ({"tasks": {k: {"_target_": "fake_task.FakeTask"} for k in "ab"}}, ConfigError, "two tasks share a name"),
        (
            {"policies": {"w": {"name": "window"}}, "tasks": {"one": {**config["tasks"]["one"], "baselines": []}}},
            ConfigError,
            "nothing to do",
        ),
        ({"seed": -1}, ConfigError, "seed is -1"),
    ]
    for change, kind, message in bad:
        with pytest.raises(kind, match=message):
            Run(config | change, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unknown_policy_option_is_named():
    with pytest.raises(ConfigError, match="budgets"):
        build_policy({"name": "h2o", "budget": 0.5, "budgets": 1})
