"""Who reads the samples of a generation: worker processes that hold the hosts, so that a job is a few numbers.

Shape legend: P candidates, S samples.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch

from namm_transfer.errors import DataError
from namm_transfer.evolution.config import EvolutionConfig
from namm_transfer.evolution.hosts import LanguageHost, load_host
from namm_transfer.evolution.page import Sample
from namm_transfer.evolution.population import Condition, read_population, read_sample
from namm_transfer.evolution.relaxed import Foresight, RelaxedReading, foresee, read_relaxed
from namm_transfer.evolution.tasks import SampleMaker
from namm_transfer.evolution.text import Split, load_documents
from namm_transfer.network import NAMM
from namm_transfer.policies import FeatureStatistics, policy
from namm_transfer.processes import begin, worker_context
from namm_transfer.spectrogram import HOP

__all__ = ["Job", "LocalReaders", "Outcome", "Reader", "Readers"]


@dataclass(frozen=True)
class Job:
    """Which sample to read, and how.

    Attributes:
        split: of the documents.
        key: makes the sample, together with the config's seed.
        number: of the sample; kinds take turns by it, and the budgets of each kind do.
        kinds: how many of the config's kinds take part, from the first on.
        by_threshold: evict by threshold instead of by the sample's budget.
    """

    split: Split
    key: tuple[int, ...]
    number: int
    kinds: int
    by_threshold: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a job found.

    Attributes:
        kind: of the sample.
        budget: it was read under; None: by threshold.
        difference: [P] mean log-likelihood of the answers minus the full cache's own, in nats a token.
        full: the latter.
        kept: [P] fraction of tokens kept just after decisions.
    """

    kind: str
    budget: float | None
    difference: np.ndarray
    full: float
    kept: np.ndarray


class Reader:
    """Reads jobs in this process, with one thread; a job's outcome is a function of the job and the candidates."""

    def __init__(self, config: EvolutionConfig, device: str = "cpu") -> None:
        torch.set_num_threads(1)
        self.config = config
        self.hosts = [load_host(name) for name in config.hosts]
        for host in self.hosts:
            host.model.to(device).set_attn_implementation("namm")  # type: ignore[arg-type]
        self._maker = functools.lru_cache(maxsize=32)(self._make)
        self.draw = functools.lru_cache(maxsize=512)(self._draw)  # validation samples come again and again

    def ready(self) -> bool:
        """Whether the hosts are loaded; to wait for a worker elsewhere."""
        return bool(self.hosts)

    def _make(self, split: Split, host: int, context_tokens: int) -> SampleMaker:
        return SampleMaker(load_documents(split), self.hosts[host].tokenizer, context_tokens, self.config.questions)

    def _draw(self, job: Job) -> tuple[Sample, Condition, LanguageHost]:
        """The sample of a job, its condition and its host; the same for the same job."""
        config = self.config
        rng = np.random.default_rng([config.seed, *job.key])
        host = int(rng.integers(len(config.hosts)))
        context, interval = config.lengths[rng.integers(len(config.lengths))]
        # A Latin square: over the rounds each kind meets every budget equally often, whatever the two counts are.
        round_number, place = divmod(job.number, job.kinds)
        budget = None if job.by_threshold else config.budgets[(place + round_number) % len(config.budgets)]
        sample = self._maker(job.split, host, context).draw(config.kinds[place], rng)
        # texts come out a little shorter than asked for; what is decided behind an answer costs nothing
        before = (int(sample.targets[0]) - 1) // HOP * HOP
        return sample, Condition(budget, min(interval, before)), self.hosts[host]

    def read(self, job: Job, namm: NAMM, vectors: np.ndarray) -> Outcome:
        """The job's sample under each of the vectors [P, 4172] float32."""
        sample, condition, host = self.draw(job)
        found = read_population(
            host.model, sample, condition, namm, torch.from_numpy(vectors), self.config.rows_at_once
        )
        difference = found.log_likelihood.cpu().numpy() - found.full
        return Outcome(sample.kind, condition.budget, difference, found.full, found.kept.cpu().numpy())

    def differentiate(self, job: Job, namm: NAMM) -> RelaxedReading | None:
        """The job's sample under the NAMM, by each of the config's budgets, with its gradient."""
        sample, condition, host = self.draw(job)
        budgets = tuple(dict.fromkeys(self.config.budgets))
        return read_relaxed(host.model, sample, condition, namm, budgets, self.config.price)

    def foresee(self, job: Job, namm: NAMM) -> Foresight | None:
        """What the job's sample needed of the tokens before its last decision."""
        sample, condition, host = self.draw(job)
        rng = np.random.default_rng([self.config.seed, *job.key, 1])
        return foresee(host.model, sample, condition.update_interval, namm, self.config.imitation_heads, rng)

    def measure(self, job: Job, vectors: np.ndarray) -> FeatureStatistics:
        """The raw features of one sample under random candidates, a part of what the search meets at its beginning."""
        sample, condition, host = self.draw(job)
        statistics = FeatureStatistics()
        memory = policy(
            "namm",
            namm=NAMM(),
            vectors=torch.from_numpy(vectors),
            budget=condition.budget,
            statistics=statistics,
        )
        read_sample(host.model, sample, memory, condition.update_interval, rows=len(vectors))
        return statistics


class Readers(Protocol):
    """A pool of readers, to be used in a `with` block."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def read(self, jobs: Sequence[Job], namm: NAMM, vectors: np.ndarray) -> list[Outcome]:
        """Read each job's sample under each of the vectors [P, 4172]."""
        ...

    def differentiate(self, jobs: Sequence[Job], namm: NAMM) -> list[RelaxedReading | None]:
        """Read each job's sample under a NAMM by each of the budgets, with its gradient; None where it has none."""
        ...

    def foresee(self, jobs: Sequence[Job], namm: NAMM) -> list[Foresight | None]:
        """What each job's sample needed of the tokens before its last decision; None where there is none."""
        ...

    def measure(self, jobs: Sequence[Job], vectors: np.ndarray) -> list[FeatureStatistics]:
        """Features of the tokens of each job's sample, under random candidates [P, 4172]."""
        ...


_state: dict[str, Reader] = {}
"""The reader of a worker process."""


def _start(config: EvolutionConfig, device: str, environment: Mapping[str, str]) -> None:
    begin(environment)
    _state["reader"] = Reader(config, device)


def _read(job: Job, namm: NAMM, vectors: np.ndarray) -> Outcome:
    return _state["reader"].read(job, namm, vectors)


def _differentiate(job: Job, namm: NAMM) -> RelaxedReading | None:
    return _state["reader"].differentiate(job, namm)


def _foresee(job: Job, namm: NAMM) -> Foresight | None:
    return _state["reader"].foresee(job, namm)


def _measure(job: Job, vectors: np.ndarray) -> FeatureStatistics:
    return _state["reader"].measure(job, vectors)


class LocalReaders:
    """`config.workers` processes of this machine.

    Args:
        config: of the evolution.
        device: that their hosts run on.

    Raises:
        NammTransferError: a host cannot be loaded. It is tried here first: of a worker that fails to start, a pool
            says only that it is broken. Whatever has to be fetched is then there for all of them.
    """

    def __init__(self, config: EvolutionConfig, device: str = "cpu") -> None:
        for host in config.hosts:
            load_host(host)
        self._pool = ProcessPoolExecutor(
            config.workers,
            mp_context=worker_context(),
            initializer=_start,
            initargs=(config, device, dict(os.environ)),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def read(self, jobs: Sequence[Job], namm: NAMM, vectors: np.ndarray) -> list[Outcome]:
        count = len(jobs)
        return self._map(_read, jobs, [namm] * count, [vectors.astype(np.float32)] * count)

    def differentiate(self, jobs: Sequence[Job], namm: NAMM) -> list[RelaxedReading | None]:
        return self._map(_differentiate, jobs, [namm] * len(jobs))

    def foresee(self, jobs: Sequence[Job], namm: NAMM) -> list[Foresight | None]:
        return self._map(_foresee, jobs, [namm] * len(jobs))

    def measure(self, jobs: Sequence[Job], vectors: np.ndarray) -> list[FeatureStatistics]:
        return self._map(_measure, jobs, [vectors.astype(np.float32)] * len(jobs))

    def _map(self, function: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
        try:
            return list(self._pool.map(function, *arguments))
        except BrokenProcessPool as error:
            raise DataError(
                "a process that reads samples was killed, as it is where memory runs out (fewer evolution.workers or "
                "rows_at_once need less); every finished generation is kept: go on with --resume"
            ) from error
