"""The descent learns, is written down step by step, and goes on bit for bit after it was killed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from namm_transfer.errors import DataError
from namm_transfer.evolution.config import EvolutionConfig
from namm_transfer.evolution.descent import descend
from namm_transfer.evolution.journal import Journal
from namm_transfer.evolution.loop import Search
from namm_transfer.evolution.readers import Job, LocalReaders, Readers
from namm_transfer.evolution.relaxed import RelaxedReading
from namm_transfer.evolution.run import run_evolution
from namm_transfer.network import NAMM, NUM_PARAMETERS

CONFIG = EvolutionConfig(descent_steps=60, descent_samples=2, descent_rate=0.05, budgets=(0.3, None))
GOAL = torch.from_numpy(np.random.default_rng(7).normal(0, 0.3, NUM_PARAMETERS)).float()


class Bowl:
    """Readings whose gradient leads to one point, a little off on every sample."""

    def __init__(self, die_at: int | None = None) -> None:
        self.jobs: list[Job] = []
        self.die_at = die_at

    def differentiate(self, jobs: Sequence[Job], namm: NAMM) -> list[RelaxedReading | None]:
        if self.die_at is not None and len(self.jobs) >= self.die_at:
            raise RuntimeError("killed")
        self.jobs.extend(jobs)
        return [self._reading(job, namm) for job in jobs]

    def _reading(self, job: Job, namm: NAMM) -> RelaxedReading:
        noise = torch.from_numpy(np.random.default_rng(job.key).normal(0, 0.05, NUM_PARAMETERS)).float()
        away = GOAL + noise - namm.to_vector()
        return RelaxedReading(-away.norm().double().repeat(2), torch.tensor([0.3, 0.5]).double(), away)


def run(folder: Path, readers: object, config: EvolutionConfig = CONFIG) -> np.ndarray:
    folder.mkdir(exist_ok=True)
    journal = Journal(folder / "journal.jsonl", config.identity())
    return descend(config, cast(Readers, readers), NAMM(), folder, journal)


def test_it_descends_and_writes_down_how(tmp_path: Path) -> None:
    bowl = Bowl()
    found = run(tmp_path, bowl)
    assert np.linalg.norm(found - GOAL.numpy()) < 0.2 * float(GOAL.norm())
    records = Journal(tmp_path / "journal.jsonl", CONFIG.identity()).of("descent")
    assert [record["step"] for record in records] == list(range(1, 61))
    assert set(records[0]["difference"]) == set(records[0]["kept"]) == {"0.3", "threshold"}
    assert records[-1]["difference"]["0.3"] > records[0]["difference"]["0.3"]
    assert len({job.key for job in bowl.jobs}) == 120  # no sample twice


@pytest.mark.parametrize("die_at", [1, 40, 118])
def test_killed_it_goes_on_bit_for_bit(tmp_path: Path, die_at: int) -> None:
    whole = run(tmp_path / "whole", Bowl())
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "part", Bowl(die_at))
    rest = Bowl()
    np.testing.assert_array_equal(run(tmp_path / "part", rest), whole)
    assert len(rest.jobs) == 120 - (die_at + 1) // 2 * 2  # and nothing was read twice


def test_seeds_differ(tmp_path: Path) -> None:
    none = replace(CONFIG, descent_steps=1)
    found = [run(tmp_path / str(seed), Bowl(), replace(none, seed=seed)) for seed in (0, 1)]
    assert np.abs(found[0] - found[1]).max() > 0.1


def test_it_begins_where_it_is_told(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl", CONFIG.identity())
    config = replace(CONFIG, descent_steps=1, descent_rate=1e-9)
    found = descend(config, cast(Readers, Bowl()), NAMM(), tmp_path, journal, start=GOAL)
    np.testing.assert_allclose(found, GOAL, atol=1e-6)


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    run(tmp_path, Bowl(), replace(CONFIG, descent_steps=1))
    (tmp_path / "descent.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(DataError, match=r"descent\.safetensors"):
        run(tmp_path, Bowl(), replace(CONFIG, descent_steps=1))


def test_samples_without_a_gradient(tmp_path: Path) -> None:
    class Empty:
        def differentiate(self, jobs: Sequence[Job], namm: NAMM) -> list[RelaxedReading | None]:
            return [None] * len(jobs)

    with pytest.raises(DataError, match="none of 2 samples"):
        run(tmp_path, Empty())


def test_the_search_begins_where_it_ended(tmp_path: Path, offline: EvolutionConfig) -> None:
    config = replace(offline, generations=1, validate_every=1, descent_steps=2, descent_samples=2)
    run_evolution(config, tmp_path / "run")
    journal = Journal(tmp_path / "run" / "journal.jsonl", config.identity())
    assert len(journal.of("descent")) == 2
    with LocalReaders(config) as readers:
        namm = NAMM.from_pretrained(tmp_path / "run" / "namm")
        start = descend(config, readers, namm, tmp_path / "run", journal)
    assert start.any()
    search = Search(start, config)
    np.testing.assert_array_equal(search.mean, start)
    search.ask()
    search.tell(np.array(journal.of("generation")[0]["fitness"]))
    found = [search.mean, start]
    assert min(float(np.abs(namm.to_vector().numpy() - vector).max()) for vector in found) < 1e-6
