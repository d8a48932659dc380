"""Around the search: fitness, the choice of the mean, the threshold; and all of it on a tiny host."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from namm_transfer import NAMM, policy
from namm_transfer.errors import ConfigError, DataError
from namm_transfer.evolution import readers, run
from namm_transfer.evolution.calibration import calibrate
from namm_transfer.evolution.config import EvolutionConfig
from namm_transfer.evolution.hosts import LanguageHost
from namm_transfer.evolution.journal import Journal
from namm_transfer.evolution.kinds import KINDS
from namm_transfer.evolution.population import read_sample
from namm_transfer.evolution.readers import Job, LocalReaders, Outcome, Reader, Readers
from namm_transfer.evolution.run import choose, evolve, run_evolution, stored_settings
from namm_transfer.evolution.text import Document
from namm_transfer.policies import FeatureStatistics

CONFIG = EvolutionConfig(
    population=4,
    diagonal=True,  # a full covariance of 4,172 parameters would take most of the time of these tests
    generations=2,
    samples=2,
    kinds=("needles", "continuation"),
    lengths=((160, 64),),
    questions=1,
    budgets=(0.3, None),
    kept_fraction=0.4,
    normaliser_samples=1,
    validate_every=1,
    validation_samples=1,
)


def test_the_best_in_validation_is_chosen(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl", {})
    with pytest.raises(DataError, match="nothing was validated"):
        choose(journal)
    for generation, of_mean, of_average in ((0, -3.0, -3.0), (5, -1.0, -2.0), (10, -2.0, -1.5), (15, -1.0, -1.2)):
        journal.append("validation_of_average", generation=generation, utility=of_average)
        journal.append("validation", generation=generation, utility=of_mean)
    assert choose(journal) == (5, 0)
    journal.append("validation_of_average", generation=20, utility=-0.5)
    assert choose(journal) == (20, 1)


class FixedReaders:
    """Keeps a fraction that is a function of the last bias alone."""

    def __init__(self, kept: Callable[[np.ndarray], np.ndarray]) -> None:
        self.kept = kept

    def read(self, jobs: Sequence[Job], namm: NAMM, vectors: np.ndarray) -> list[Outcome]:
        assert all(job.by_threshold and job.split == "train" for job in jobs)
        return [Outcome("needles", None, np.zeros(len(vectors)), 0.0, self.kept(vectors[:, -1]))] * len(jobs)


def test_the_threshold_is_shifted_to_keep_what_was_asked_for() -> None:
    def kept(bias: np.ndarray) -> np.ndarray:
        return np.asarray(1 / (1 + np.exp(-(bias - 0.9))))

    start = NAMM.from_vector(torch.linspace(-1, 1, 4172))
    namm, fraction = calibrate(start, CONFIG, 0.4, cast(Readers, FixedReaders(kept)))
    assert fraction == pytest.approx(0.4, abs=0.03)
    assert kept(namm.to_vector()[-1:].numpy())[0] == pytest.approx(fraction, abs=1e-4)
    assert torch.equal(namm.to_vector()[:-1], start.to_vector()[:-1])


def test_a_threshold_that_cannot_be_met_is_an_error() -> None:
    with pytest.raises(DataError, match=r"keeps 0\.4"):
        calibrate(NAMM(), CONFIG, 0.4, cast(Readers, FixedReaders(lambda bias: np.full(len(bias), 0.9))))


@pytest.fixture
def in_this_process(
    monkeypatch: pytest.MonkeyPatch,
    llama: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    documents: tuple[Document, ...],
) -> None:
    """The workers are threads with a tiny host and made-up documents."""

    def pool(workers: int, mp_context: object, initializer: Callable, initargs: tuple) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, initializer=initializer, initargs=initargs)

    monkeypatch.setattr(readers, "ProcessPoolExecutor", pool)
    monkeypatch.setattr(readers, "load_host", lambda name: LanguageHost("tiny", llama(layers=1), tokenizer))
    monkeypatch.setattr(readers, "load_documents", lambda split: documents)


def same(folder: Path, other: Path) -> bool:
    one, two = NAMM.from_pretrained(folder / "namm"), NAMM.from_pretrained(other / "namm")
    return one.fingerprint() == two.fingerprint()


@pytest.mark.usefixtures("in_this_process")
def test_a_whole_evolution_and_one_that_was_resumed(tmp_path: Path) -> None:
    namm = run_evolution(CONFIG, tmp_path / "whole")
    assert NAMM.from_pretrained(tmp_path / "whole" / "namm").fingerprint() == namm.fingerprint()
    assert namm.feature_var.min() > 0
    with (tmp_path / "whole" / "progress.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["generation"] for row in rows] == ["1", "2"]
    assert all(float(row["best"]) >= float(row["mean"]) for row in rows)
    assert (tmp_path / "whole" / "curves.png").stat().st_size > 10_000
    run_evolution(replace(CONFIG, generations=1), tmp_path / "parts")
    run_evolution(CONFIG, tmp_path / "parts")
    assert same(tmp_path / "whole", tmp_path / "parts")

    # by rank the bias is without effect, by threshold it is what was calibrated
    sample, condition, host = Reader(CONFIG).draw(Job("train", (9,), 0, 2))
    shifted = namm.to_vector()
    shifted[-1] += 1
    other = NAMM.from_vector(shifted, feature_mean=namm.feature_mean, feature_var=namm.feature_var)
    one, two = (read_sample(host.model, sample, policy("namm", namm=n, budget=0.3), 64) for n in (namm, other))
    assert torch.equal(one.log_likelihood, two.log_likelihood)
    assert condition.update_interval == 64


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    ("kinds", "budgets"),
    [
        (("needles", "recall", "continuation"), (0.2, 0.35, 0.5)),
        (("needles", "recall", "needles", "continuation"), (0.2, None)),
        (("needles", "recall"), (0.2, 0.35, 0.5)),
    ],
)
def test_every_kind_meets_every_budget_equally_often(kinds: tuple[str, ...], budgets: tuple[float, ...]) -> None:
    reader = Reader(replace(CONFIG, kinds=kinds, budgets=budgets))
    drawn = [reader.draw(Job("train", (1, i), i, len(kinds))) for i in range(2 * len(kinds) * len(budgets))]
    met = Counter((sample.kind, condition.budget) for sample, condition, _ in drawn)
    assert met == {(kind, budget): 2 * kinds.count(kind) for kind in kinds for budget in budgets}


@pytest.mark.usefixtures("in_this_process")
def test_stages_add_a_kind_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[set[str]] = []
    read = LocalReaders.read

    def watched(self: LocalReaders, jobs: Sequence[Job], namm: NAMM, vectors: np.ndarray) -> list[Outcome]:
        outcomes = read(self, jobs, namm, vectors)
        if jobs[0].split == "train" and not jobs[0].by_threshold:
            met.append({outcome.kind for outcome in outcomes})
        return outcomes

    monkeypatch.setattr(LocalReaders, "read", watched)
    staged = replace(CONFIG, kinds=("continuation", "recall", "needles"), samples=6, samples_max=6, generations=5)
    run_evolution(replace(staged, stage_generations=2, kept_fraction=None, validate_every=5), tmp_path)
    one, two, three = {"continuation"}, {"continuation", "recall"}, {"continuation", "recall", "needles"}
    assert met == [one, one, two, two, three]


@pytest.mark.usefixtures("in_this_process")
def test_a_normaliser_of_no_tokens_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalReaders, "measure", lambda *args: [FeatureStatistics()])
    with pytest.raises(DataError, match="no token was scored in 1 samples"):
        run_evolution(CONFIG, tmp_path / "run")
    assert len((tmp_path / "run" / "journal.jsonl").read_text().splitlines()) == 1, "no normaliser to resume with"


@pytest.mark.usefixtures("in_this_process")
def test_a_failed_calibration_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise DataError("no shift of the threshold")

    with monkeypatch.context() as patch:
        patch.setattr(run, "calibrate", fail)
        with pytest.raises(DataError, match=r"no shift of the threshold; the NAMM as evolved is in .*best"):
            run_evolution(CONFIG, tmp_path)
    kept = NAMM.from_pretrained(tmp_path / "best")
    resumed = run_evolution(CONFIG, tmp_path)
    assert torch.equal(kept.to_vector()[:-1], resumed.to_vector()[:-1])


@pytest.mark.usefixtures("in_this_process")
def test_a_run_is_resumed_with_what_it_was_begun_with(tmp_path: Path) -> None:
    folder, settings = tmp_path / "run", {"evolution": asdict(replace(CONFIG, generations=1))}
    evolve(settings | {"out": str(folder)}, resume=None, console=Console(quiet=True))
    stored = stored_settings(folder)["evolution"]
    assert EvolutionConfig.from_mapping(stored) == replace(CONFIG, generations=1)
    run_evolution(EvolutionConfig.from_mapping(stored | {"generations": 2}), folder, executor={"device": "cpu"})
    assert stored_settings(folder)["evolution"]["generations"] == 2
    assert stored_settings(folder)["executor"] == {"device": "cpu"}
    before = (folder / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match=r"sigma: 0\.065 in the file, 0\.5 now"):
        run_evolution(replace(CONFIG, sigma=0.5), folder)
    assert (folder / "config.yaml").read_bytes() == before
    with pytest.raises(DataError, match="holds no run"):
        stored_settings(tmp_path / "nowhere")


@pytest.mark.usefixtures("in_this_process")
def test_killed_before_the_first_line_it_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "Journal", die)
    with pytest.raises(KeyboardInterrupt):
        run_evolution(CONFIG, tmp_path / "run")
    assert EvolutionConfig.from_mapping(stored_settings(tmp_path / "run")["evolution"]) == CONFIG


@pytest.mark.usefixtures("in_this_process")
def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    config = replace(CONFIG, generations=1)
    first = run_evolution(config, tmp_path)
    before = (tmp_path / "journal.jsonl").read_bytes()
    assert run_evolution(config, tmp_path).fingerprint() == first.fingerprint()
    assert (tmp_path / "journal.jsonl").read_bytes() == before


@pytest.mark.usefixtures("in_this_process")
def test_settings_that_would_do_nothing_are_refused(tmp_path: Path) -> None:
    for given in ({"workers": 2}, {"threads": 4}):
        with pytest.raises(ConfigError, match="would do nothing"):
            run_evolution(CONFIG, tmp_path / "run", executor=given)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("in_this_process")
def test_a_centre_that_is_not_finite_is_never_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its neighbour's worth is not lent to it, and what is written is JSON."""
    read = Reader.read

    def broken(self: Reader, job: Job, namm: NAMM, vectors: np.ndarray) -> Outcome:
        found = read(self, job, namm, vectors)
        return replace(found, difference=np.array([np.nan, -1.0])) if job.split == "validation" else found

    monkeypatch.setattr(Reader, "read", broken)
    run_evolution(replace(CONFIG, generations=1), tmp_path)
    journal = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert {record["difference"] for record in journal if record["event"] == "validation"} == {-100.0}
    assert [record["centre"] for record in journal if record["event"] == "result"] == ["average"]


@pytest.mark.usefixtures("in_this_process")
def test_every_decision_falls_before_the_answers() -> None:
    reader = Reader(replace(CONFIG, lengths=((128, 128),), kinds=tuple(KINDS)))
    for number in range(4 * len(KINDS)):
        sample, condition, _ = reader.draw(Job("train", (1, number), number, len(KINDS)))
        assert condition.update_interval % 16 == 0 and 0 < condition.update_interval < int(sample.targets[0])


def test_a_host_that_cannot_be_loaded_is_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"host '.*nowhere' is none of the packaged hosts"):
        run_evolution(replace(CONFIG, hosts=(str(tmp_path / "nowhere"),)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("in_this_process")
def test_jobs_are_pure(tmp_path: Path) -> None:
    with LocalReaders(CONFIG) as pool:
        vectors = np.random.default_rng(0).normal(0, 0.1, (3, 4172))
        jobs = [Job("train", (1, i), i, 2) for i in range(2)]
        one, two = pool.read(jobs, NAMM(), vectors), pool.read(jobs[::-1], NAMM(), vectors)[::-1]
    for first, second in zip(one, two, strict=True):
        assert np.array_equal(first.difference, second.difference)
        assert first.full == second.full
    assert [outcome.kind for outcome in one] == ["needles", "continuation"]
