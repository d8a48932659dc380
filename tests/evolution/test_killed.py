"""The command, killed by SIGKILL, goes on bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from omegaconf import OmegaConf
from rich.console import Console

from namm_transfer import NAMM
from namm_transfer.errors import DataError
from namm_transfer.evolution import journal
from namm_transfer.evolution.config import EvolutionConfig
from namm_transfer.evolution.run import evolve, run_evolution


def records(folder: Path) -> list[dict]:
    """The journal without the times."""
    lines = (folder / "journal.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


def test_killed_by_sigkill_it_goes_on_bit_for_bit(offline: EvolutionConfig, tmp_path: Path) -> None:
    offline = replace(offline, generations=12)
    whole = run_evolution(offline, tmp_path / "whole")
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / "config.yaml").write_text(OmegaConf.to_yaml({"evolution": asdict(offline)}))
    command = [str(Path(sys.executable).with_name("namm-transfer")), "evolve", "--resume", str(killed)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while (
        not (killed / "journal.jsonl").is_file()
        or '"generation": 1, "fitness"' not in (killed / "journal.jsonl").read_text()
    ):
        assert process.poll() is None and time.monotonic() < until, "it ended before its first generation did"
        time.sleep(0.005)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not psutil.wait_procs(workers, timeout=30)[1], "a worker outlived the search"
    assert records(killed) == records(tmp_path / "whole")[: len(records(killed))]
    assert len(records(killed)) < len(records(tmp_path / "whole"))

    assert json.loads((killed / "provenance.json").read_text())["starts"][0]["versions"]["cma"]
    resumed = run_evolution(offline, killed)
    assert records(killed) == records(tmp_path / "whole")
    assert resumed.fingerprint() == whole.fingerprint() == NAMM.from_pretrained(killed / "namm").fingerprint()


def test_after_a_full_disk_it_goes_on_bit_for_bit(
    offline: EvolutionConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, calls = journal.append_json, []

    def full(path: Path, record: Mapping[str, Any]) -> None:
        calls.append(record["event"])
        if calls.count("generation") == 2:
            with path.open("a") as file:  # what fits is written
                file.write(json.dumps(record)[:100])
            raise OSError(28, "No space left on device")
        append(path, record)

    settings = {"evolution": asdict(offline), "out": str(tmp_path / "run")}
    with monkeypatch.context() as patch:
        patch.setattr(journal, "append_json", full)
        with pytest.raises(DataError, match=r"No space left on device.*finished generation is kept.*--resume .*run"):
            evolve(settings, resume=None, console=Console(quiet=True))
    whole = run_evolution(offline, tmp_path / "whole")
    assert run_evolution(offline, tmp_path / "run").fingerprint() == whole.fingerprint()
    assert records(tmp_path / "run") == records(tmp_path / "whole")
