"""A search on returns plays what the task plays, moves where returns are higher, and survives a kill bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from namm_transfer import NAMM, policy
from namm_transfer.errors import ConfigError
from namm_transfer.eval.offline_rl import returns
from namm_transfer.eval.offline_rl.host import load_host
from namm_transfer.eval.offline_rl.returns import ReturnsConfig, evolve_on_returns, returns_of


@pytest.fixture
def config(tiny_hosts: Path) -> ReturnsConfig:
    return ReturnsConfig(
        host=str(tiny_hosts / "dt"), update_interval=16, budgets=(0.3, 0.6), population=4, generations=3, episodes=1,
        validation_episodes=2, validate_every=2,
    )  # fmt: skip


def test_each_row_plays_what_the_task_plays(episodes, tiny_hosts) -> None:
    units = episodes.units(0)
    seeds = [int(unit.id) for unit in units]
    model, normalisation = load_host(tiny_hosts / "dt")
    found, kept = returns_of(model, normalisation, policy("h2o", budget=0.4), seeds, 16)
    expected = {outcome.unit.id: outcome for outcome in episodes.evaluate(units, policy("h2o", budget=0.4), 0)}
    assert found.tolist() == pytest.approx([expected[unit.id].score for unit in units])
    assert kept.tolist() == pytest.approx([expected[unit.id].kept_at_updates for unit in units])


def test_candidates_are_rows_of_one_batch(config, tiny_hosts) -> None:
    """A candidate among others earns what it earns alone."""
    model, normalisation = load_host(tiny_hosts / "dt")
    vectors = torch.randn(3, 4172, generator=torch.Generator().manual_seed(0)) * 0.1
    together, _ = returns_of(
        model, normalisation, policy("namm", namm=NAMM(), vectors=vectors, budget=0.3), [5, 5, 6], 16
    )
    for vector, seed, earned in zip(vectors, (5, 5, 6), together, strict=True):
        alone, _ = returns_of(
            model, normalisation, policy("namm", namm=NAMM.from_vector(vector), budget=0.3), [seed], 16
        )
        assert alone[0] == pytest.approx(earned, rel=1e-3)


def test_killed_it_goes_on_bit_for_bit(config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evolve_on_returns(config, tmp_path / "whole")
    calls, play = [], returns.returns_of

    def dying(*args: object) -> tuple[np.ndarray, np.ndarray]:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return play(*args)

    with monkeypatch.context() as patch:
        patch.setattr(returns, "returns_of", dying)
        with pytest.raises(KeyboardInterrupt):
            evolve_on_returns(config, tmp_path / "killed")
    resumed = evolve_on_returns(config, tmp_path / "killed")
    assert resumed.fingerprint() == whole.fingerprint() == NAMM.from_pretrained(tmp_path / "whole/namm").fingerprint()

    def records(name: str) -> list[dict]:
        lines = (tmp_path / name / "journal.jsonl").read_text().splitlines()
        return [{key: x for key, x in json.loads(line).items() if key != "seconds"} for line in lines]

    assert records("killed") == records("whole")
    with pytest.raises(ConfigError, match="budgets"):
        evolve_on_returns(replace(config, budgets=(0.5, 0.6)), tmp_path / "whole")
    with pytest.raises(ConfigError, match="at least two episodes"):
        replace(config, budgets=(0.5,))
