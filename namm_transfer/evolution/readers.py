"""Worker processes that read samples: each holds the host model, so that a job is a few numbers and the candidates.

Shape legend: P candidates, S samples.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import torch

from namm_transfer.evolution.config import EvolutionConfig
from namm_transfer.evolution.hosts import LanguageHost, load_host
from namm_transfer.evolution.population import Condition, read_full, read_population, read_sample
from namm_transfer.evolution.tasks import Sample, SampleMaker
from namm_transfer.evolution.text import Split, load_documents
from namm_transfer.network import NAMM
from namm_transfer.policies import FeatureStatistics, policy

__all__ = ["Job", "Outcome", "Readers", "draw"]


@dataclass(frozen=True)
class Job:
    """Which sample to read, and how.

    Attributes:
        split: of the documents.
        key: makes the sample, together with the config's seed.
        number: of the sample; kinds take turns by it, and the budgets of each kind do.
        by_threshold: evict by threshold instead of by the sample's budget.
    """

    split: Split
    key: tuple[int, ...]
    number: int
    by_threshold: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a job found: kind of sample, [P] log-likelihood minus the full cache's own, the latter, [P] kept.

    Kept is NaN where no decision was taken.
    """

    kind: str
    difference: np.ndarray
    full: float
    kept: np.ndarray


@functools.lru_cache(maxsize=8)
def _maker(split: Split, context_tokens: int, questions: int) -> SampleMaker:
    return SampleMaker(load_documents(split), _host().tokenizer, context_tokens, questions)


def draw(config: EvolutionConfig, job: Job) -> tuple[Sample, Condition]:
    """The sample of a job and its condition; a pure function of both arguments."""
    rng = np.random.default_rng([config.seed, *job.key])
    context = int(rng.choice(config.context_tokens))
    interval = int(rng.choice(config.update_intervals))
    # A Latin square: over the rounds each kind meets every budget equally often, whatever the two counts are.
    round_number, place = divmod(job.number, len(config.kinds))
    kind = config.kinds[place]
    budget = None if job.by_threshold else config.budgets[(place + round_number) % len(config.budgets)]
    return _maker(job.split, context, config.questions).draw(kind, rng), Condition(budget, interval)


_state: dict[str, LanguageHost | EvolutionConfig] = {}


def _host() -> LanguageHost:
    host = _state["host"]
    assert isinstance(host, LanguageHost)
    return host


def _start(config: EvolutionConfig) -> None:
    torch.set_num_threads(1)
    host = load_host(config.host)
    host.model.set_attn_implementation("namm")
    _state.update(host=host, config=config)


def _config() -> EvolutionConfig:
    config = _state["config"]
    assert isinstance(config, EvolutionConfig)
    return config


def _read(job: Job, namm: NAMM, vectors: np.ndarray) -> Outcome:
    config = _config()
    sample, condition = draw(config, job)
    full = _full(job)
    found, kept = read_population(
        _host().model, sample, condition, namm, torch.from_numpy(vectors).float(), config.rows_at_once
    )
    return Outcome(sample.kind, found.numpy() - full, full, kept.numpy())


@functools.lru_cache(maxsize=256)  # validation samples come again and again
def _full(job: Job) -> float:
    return read_full(_host().model, draw(_config(), job)[0])


def _measure(job: Job, vectors: np.ndarray) -> FeatureStatistics:
    """The raw features of one sample under random candidates, a part of the distribution that the search begins at."""
    config = _config()
    sample, condition = draw(config, job)
    statistics = FeatureStatistics()
    memory = policy(
        "namm",
        namm=NAMM(),
        vectors=torch.from_numpy(vectors).float(),
        budget=condition.budget,
        statistics=statistics,
    )
    read_sample(_host().model, sample, memory, condition.update_interval, rows=len(vectors))
    return statistics


class Readers:
    """A pool of workers, to be used in a `with` block.

    Raises:
        NammTransferError: the host cannot be loaded. It is tried here first: of a worker that fails to start, a pool
            says only that it is broken. Whatever has to be fetched is then there for all of them.
    """

    def __init__(self, config: EvolutionConfig) -> None:
        load_host(config.host)
        self._pool = ProcessPoolExecutor(
            config.workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start,
            initargs=(config,),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def read(self, jobs: Sequence[Job], namm: NAMM, vectors: np.ndarray) -> list[Outcome]:
        """Read each job's sample under each of the vectors [P, 4172]."""
        count = len(jobs)
        return list(self._pool.map(_read, jobs, [namm] * count, [vectors.astype(np.float32)] * count))

    def statistics(self, jobs: Sequence[Job], vectors: np.ndarray) -> FeatureStatistics:
        """Features over all tokens of the jobs' samples, under random candidates [P, 4172]."""
        parts = self._pool.map(_measure, jobs, [vectors.astype(np.float32)] * len(jobs))
        total = FeatureStatistics()
        for part in parts:
            total.count += part.count
            total.total += part.total
            total.squares += part.squares
        return total
