"""The search survives being killed at any moment, bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from namm_transfer.errors import ConfigError, DataError
from namm_transfer.evolution.config import EvolutionConfig
from namm_transfer.evolution.journal import Journal
from namm_transfer.evolution.loop import Evaluation, Search, run_search

DIMENSIONS = 12
TARGET = np.linspace(-1, 1, DIMENSIONS)
CONFIG = EvolutionConfig(generations=9, population=8, sigma=0.3, seed=5, validate_every=3)


class Killed(Exception):
    """Stands for the process dying."""


def worth(generation: int, candidates: np.ndarray) -> Evaluation:
    """Minus the squared distance to a target, with noise that every candidate of a generation shares."""
    distance = ((candidates - TARGET) ** 2).sum(1)
    shift = np.random.default_rng(generation).normal()
    return Evaluation(fitness=shift - distance, difference=-distance, kept=np.full(len(candidates), 0.5))


def search_to_the_end(path: Path, config: EvolutionConfig = CONFIG, die_in: int | None = None) -> Search:
    def evaluate(generation: int, candidates: np.ndarray) -> Evaluation:
        if generation == die_in:
            raise Killed
        return worth(generation, candidates)

    def validate(generation: int, centres: np.ndarray) -> list[dict[str, float]]:
        return [{"difference": -float(d)} for d in ((centres - TARGET) ** 2).sum(1)]

    search = Search(np.zeros(DIMENSIONS), config)
    kept: dict[int, np.ndarray] = {}
    run_search(search, evaluate, validate, kept.__setitem__, Journal(path, config.identity()), config)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    validated = {r["generation"]: r["difference"] for r in records if r["event"] == "validation"}
    assert kept.keys() == validated.keys()  # also where the search was resumed
    for generation, (mean, _) in kept.items():
        assert -((mean - TARGET) ** 2).sum() == validated[generation]
    return search


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("die_in", [0, 1, 3, 8])
def test_a_killed_search_goes_on_bit_for_bit(tmp_path: Path, diagonal: bool, die_in: int) -> None:
    config = replace(CONFIG, diagonal=diagonal)
    whole = search_to_the_end(tmp_path / "whole.jsonl", config)
    with pytest.raises(Killed):
        search_to_the_end(tmp_path / "killed.jsonl", config, die_in)
    resumed = search_to_the_end(tmp_path / "killed.jsonl", config)
    assert np.array_equal(whole.mean, resumed.mean)
    assert whole.sigma == resumed.sigma
    assert np.array_equal(whole.ask(), resumed.ask())

    def told(name: str) -> list[dict]:
        records = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        return [{k: v for k, v in record.items() if k != "seconds"} for record in records]

    assert told("whole.jsonl") == told("killed.jsonl")


def test_it_finds_the_target(tmp_path: Path) -> None:
    search = search_to_the_end(tmp_path / "journal.jsonl", replace(CONFIG, generations=120, validate_every=120))
    assert ((search.mean - TARGET) ** 2).sum() < 1e-3 * (TARGET**2).sum()


def test_the_average_is_over_the_newer_half() -> None:
    search = Search(np.zeros(DIMENSIONS), CONFIG)
    assert np.array_equal(search.average, np.zeros(DIMENSIONS))
    means = []
    for generation in range(5):
        search.tell(worth(generation, search.ask()).fitness)
        means.append(search.mean)
    np.testing.assert_allclose(search.average, np.mean(means[2:], axis=0))


def test_a_torn_last_line_is_dropped_and_told_again(tmp_path: Path) -> None:
    whole = search_to_the_end(tmp_path / "whole.jsonl")
    path = tmp_path / "torn.jsonl"
    content = (tmp_path / "whole.jsonl").read_bytes()
    last_generation = content.rfind(b'{"event": "generation"')
    path.write_bytes(content[: last_generation + 40])
    assert np.array_equal(search_to_the_end(path).mean, whole.mean)
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()].count("generation") == 9


def test_damage_before_the_last_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    search_to_the_end(path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2][:30], *lines[3:]]) + "\n")
    with pytest.raises(DataError, match="line 3"):
        search_to_the_end(path)


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    search_to_the_end(path)
    with pytest.raises(ConfigError, match=r"sigma: 0\.3 in the file, 0\.1 now"):
        search_to_the_end(path, replace(CONFIG, sigma=0.1))


def test_more_generations_go_on_from_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    search_to_the_end(path)
    longer = replace(CONFIG, generations=12)
    whole = search_to_the_end(tmp_path / "whole.jsonl", longer)
    assert np.array_equal(search_to_the_end(path, longer).mean, whole.mean)


def test_the_global_generator_is_left_alone(tmp_path: Path) -> None:
    np.random.seed(3)
    expected = np.random.random(4)
    np.random.seed(3)
    search_to_the_end(tmp_path / "journal.jsonl")
    assert np.array_equal(np.random.random(4), expected)


def test_time_runs_out(tmp_path: Path) -> None:
    search = search_to_the_end(tmp_path / "journal.jsonl", replace(CONFIG, minutes=1e-9))
    assert search.generation == 0


def test_sigma_is_bounded() -> None:
    bounded = replace(CONFIG, sigma_max=CONFIG.sigma)
    free, bound = (Search(np.zeros(DIMENSIONS), config) for config in (CONFIG, bounded))
    for _ in range(30):  # fitness along one direction: a search that widens
        for search in (free, bound):
            search.tell(search.ask() @ np.ones(DIMENSIONS))
        assert bound.sigma <= CONFIG.sigma
    assert free.sigma > CONFIG.sigma


def test_a_fitness_that_is_not_finite_is_refused() -> None:
    search = Search(np.zeros(DIMENSIONS), CONFIG)
    search.ask()
    with pytest.raises(DataError, match="8 finite"):
        search.tell(np.full(8, np.nan))


def test_a_search_that_asks_for_others_than_it_did_is_not_told(tmp_path: Path) -> None:
    """As with other versions of the libraries: the journal's fitness would be told to the wrong points."""
    path = tmp_path / "journal.jsonl"
    search_to_the_end(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    (second,) = [line for line in lines if line.get("generation") == 1 and line["event"] == "generation"]
    second["candidates"] = "0" * 16
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match="generation 1 had other candidates"):
        search_to_the_end(path)


def test_its_bits_do_not_depend_on_the_number_of_threads() -> None:
    config = EvolutionConfig(population=8, seed=1)
    found = []
    for threads in (1, 2):
        with threadpool_limits(threads, "blas"):
            search = Search(np.zeros(300), config)
            for _ in range(40):  # past several decompositions of the covariance
                search.tell(-np.square(search.ask() - 1).sum(1))
            found.append(search.mean)
    np.testing.assert_array_equal(*found)
