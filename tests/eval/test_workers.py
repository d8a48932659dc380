"""Rows do not depend on who evaluates; a worker that dies or fails costs nothing that was finished."""

import io
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from namm_transfer.errors import ConfigError, DataError
from namm_transfer.eval.results import RunFolder
from namm_transfer.eval.runner import Run
from namm_transfer.eval.workers import build_task, use_workers
from namm_transfer.network import NAMM, NUM_PARAMETERS

HERE = Path(__file__).parent
CONSOLE = Console(file=io.StringIO())


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setenv("PYTHONPATH", str(HERE))  # of Ray's workers
    monkeypatch.setenv("FAKE_TASK_LOG", str(tmp_path / "log"))
    NAMM.from_vector(torch.zeros(NUM_PARAMETERS)).save_pretrained(tmp_path / "namm")
    return {
        "tasks": {
            "one": {"_target_": "fake_task.FakeTask", "name": "fake", "clips": 7, "pause": 0.01},
            "two": {"_target_": "fake_task.FakeTask", "name": "other", "clips": 2, "questions": 3, "baselines": []},
        },
        "policies": {
            "h2o": {"name": "h2o", "budget": "matched"},
            "full": {"name": "full"},
            "namm": {"name": "namm", "namm": str(tmp_path / "namm"), "budget": None},
            "window": {"name": "window"},
        },
        "seed": 0,
        "executor": {"threads": None},
    }


def found(folder):
    """Rows without what differs from run to run: order and time."""
    rows = [replace(row, seconds=None) for row in RunFolder(folder).rows()]
    assert len({row.key for row in rows}) == len(rows)
    return sorted(rows, key=lambda row: row.key)


@pytest.fixture
def alone(config, tmp_path):
    Run(config, tmp_path / "alone")(CONSOLE)
    return found(tmp_path / "alone")


def test_processes_find_the_same(config, alone, tmp_path):
    run = Run(config | {"executor": {"threads": None, "workers": 3}}, tmp_path / "many")
    run(CONSOLE)
    assert found(tmp_path / "many") == alone
    assert len(alone) == len(run.plan)


def test_a_run_goes_on_with_another_number_of_workers(config, alone, tmp_path):
    config["tasks"]["one"]["interrupt_after"] = 5
    with pytest.raises(KeyboardInterrupt):
        Run(config, tmp_path / "run")(CONSOLE)
    config["tasks"]["one"].pop("interrupt_after")
    lines = (tmp_path / "run" / "config.yaml").read_text().replace("    interrupt_after: 5\n", "")
    (tmp_path / "run" / "config.yaml").write_text(lines)
    run = Run(config | {"executor": {"threads": None, "workers": 2}}, tmp_path / "run")
    assert run.finished == 5
    run(CONSOLE)
    assert found(tmp_path / "run") == alone


def test_a_worker_that_is_killed_loses_no_row(config, alone, tmp_path):
    config["tasks"]["one"]["pause"] = 0.3
    lines = tmp_path / "run" / "rows.jsonl"

    def kill():
        while not lines.exists() or len(lines.read_bytes().splitlines()) < 3:
            time.sleep(0.05)
        os.kill(next(child for child in workers() if child not in before), signal.SIGKILL)

    before = workers()
    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(DataError, match="a worker failed: BrokenProcessPool"):
        Run(config | {"executor": {"workers": 2}}, tmp_path / "run")(CONSOLE)
    killer.join()
    kept = found(tmp_path / "run")
    assert 3 <= len(kept) < len(alone)
    config["tasks"]["one"]["pause"] = 0.01
    text = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(text.replace("pause: 0.3", "pause: 0.01"))
    run = Run(config | {"executor": {"workers": 2}}, tmp_path / "run")
    assert run.finished == len(kept)
    run(CONSOLE)
    assert found(tmp_path / "run") == alone


def workers():
    """Processes that evaluate: forked from the server that is a child of this process."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(status.parent.name)] = int(status.read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ProcessLookupError):
            continue
    # the manager of the queue is forked first; it has the lowest number
    return sorted(child for child, parent in parents.items() if parents.get(parent) == os.getpid())[1:]


def test_what_a_worker_raises_is_raised_here(config, tmp_path):
    config["policies"] = {"full": {"name": "full"}}
    config["tasks"]["one"]["model"] = None
    run = Run(config | {"executor": {"workers": 2}}, tmp_path / "run")
    run.config["tasks"]["two"]["clips"] = 0  # found out only where it is built again
    with pytest.raises(ConfigError, match="clips is 0; expected at least 1"):
        run(CONSOLE)


def test_why_a_task_cannot_be_built_is_told(config):
    with pytest.raises(ConfigError, match=r"cannot build the task: .*FakeTask.*unexpected keyword argument 'colour'"):
        build_task(config["tasks"]["one"] | {"colour": 3})


@pytest.mark.parametrize("workers", [0, -1, True, "2", None])
def test_a_number_of_workers_that_is_none(workers):
    with pytest.raises(ConfigError, match="expected an integer of at least 1"):
        use_workers({"workers": workers})


def test_ray_finds_the_same_though_a_worker_dies(config, alone, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)  # its workers look for modules here first, and a checkout is no installed package
    marker = tmp_path / "died"
    config["tasks"]["one"] |= {"_target_": "fake_task.DyingTask", "marker": str(marker)}
    Run(config | {"executor": {"name": "ray", "workers": None}}, tmp_path / "run")(CONSOLE)
    assert not ray.is_initialized()
    assert marker.exists()
    assert found(tmp_path / "run") == alone
