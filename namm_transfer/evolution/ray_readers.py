"""Readers on a Ray cluster: actors that hold the hosts, on as many machines as there are.

Shape legend: P candidates.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np

from namm_transfer.errors import ConfigError, DataError
from namm_transfer.evolution.config import EvolutionConfig
from namm_transfer.evolution.readers import Job, Outcome, Reader
from namm_transfer.evolution.relaxed import Foresight, RelaxedReading
from namm_transfer.network import NAMM
from namm_transfer.policies import FeatureStatistics

__all__ = ["RayReaders"]

_RETRIES = 5
"""Of a job whose worker died: one that always kills its worker has to end."""
_PATIENCE = 900
"""Seconds for all workers to load their hosts."""


class RayReader(Reader):
    """A reader on another machine, or in a process that was begun with another environment."""

    def __init__(self, config: EvolutionConfig, device: str, environment: Mapping[str, str]) -> None:
        os.environ.update(environment)
        super().__init__(config, device)


class RayReaders:
    """Actors on a Ray cluster; one that dies is started again, on any node, and what it was reading is read again.

    A job's candidates are spread too, in the parts of `config.rows_at_once` that one process would read one after the
    other, so the values are those of `LocalReaders`.

    Args:
        config: of the evolution.
        executor: `address` of a cluster, "auto" for the one of this machine, None to start one here;
            `cpus_per_worker`, `gpus_per_worker`; `workers`, None for as many as the cluster has room for.

    Raises:
        ConfigError: Ray is not installed, or the cluster has no room for a worker, or for so many.
        DataError: a worker cannot load a host, or does not start in time.
    """

    def __init__(self, config: EvolutionConfig, executor: Mapping[str, Any]) -> None:
        try:
            import ray
            from ray.util import ActorPool
        except ImportError as error:
            raise ConfigError("executor=ray needs Ray: pip install 'namm-transfer[ray]'") from error
        self._ray, self._rows = ray, config.rows_at_once
        self._started = not ray.is_initialized()
        if self._started:
            ray.init(address=executor.get("address") or "local", log_to_driver=False, include_dashboard=False)
        needs = {"num_cpus": executor.get("cpus_per_worker", 1), "num_gpus": executor.get("gpus_per_worker", 0)}
        settings = {key: value for key, value in os.environ.items() if key.startswith("NAMM_TRANSFER_")}
        worker: Any = ray.remote(max_restarts=-1, max_task_retries=_RETRIES, **needs)(RayReader)
        device = "cuda" if needs["num_gpus"] else "cpu"
        room = _room([node["Resources"] for node in ray.nodes() if node["Alive"]], needs)
        count = executor.get("workers") or room
        if count > room:
            raise ConfigError(f"executor.workers is {count}, but the Ray cluster has room for {room}")
        self._workers: list[Any] = [worker.remote(config, device, settings) for _ in range(count)]
        try:
            ray.get([one.ready.remote() for one in self._workers], timeout=_PATIENCE)
        except ray.exceptions.GetTimeoutError as error:
            raise DataError(
                f"after {_PATIENCE} seconds not all of {count} workers had started: of {ray.cluster_resources()}, "
                f"{ray.available_resources()} are free"
            ) from error
        except ray.exceptions.RayActorError as error:
            raise DataError(f"a worker on the Ray cluster could not start: {error}") from error
        self._pool: Any = ActorPool(self._workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            self._ray.kill(worker)
        if self._started:
            self._ray.shutdown()

    def read(self, jobs: Sequence[Job], namm: NAMM, vectors: np.ndarray) -> list[Outcome]:
        wide = vectors.astype(np.float32)
        parts = [wide[first : first + self._rows] for first in range(0, len(wide), self._rows)]
        tasks = [(job, part) for job in jobs for part in parts]
        found = list(self._pool.map(lambda worker, task: worker.read.remote(task[0], namm, task[1]), tasks))
        return [joined(found[i : i + len(parts)]) for i in range(0, len(found), len(parts))]

    def differentiate(self, jobs: Sequence[Job], namm: NAMM) -> list[RelaxedReading | None]:
        return list(self._pool.map(lambda worker, job: worker.differentiate.remote(job, namm), jobs))

    def foresee(self, jobs: Sequence[Job], namm: NAMM) -> list[Foresight | None]:
        return list(self._pool.map(lambda worker, job: worker.foresee.remote(job, namm), jobs))

    def measure(self, jobs: Sequence[Job], vectors: np.ndarray) -> list[FeatureStatistics]:
        wide = vectors.astype(np.float32)
        return list(self._pool.map(lambda worker, job: worker.measure.remote(job, wide), jobs))


def joined(parts: Sequence[Outcome]) -> Outcome:
    """The outcome of all candidates from those of their parts, in order."""
    first = parts[0]
    return Outcome(
        first.kind,
        first.budget,
        np.concatenate([part.difference for part in parts]),
        first.full,
        np.concatenate([part.kept for part in parts]),
    )


def _room(nodes: Sequence[Mapping[str, float]], needs: Mapping[str, float]) -> int:
    """How many workers a cluster has room for, given each node's resources: a worker lives on one."""
    names = {"num_cpus": "CPU", "num_gpus": "GPU"}
    wanted = {names[name]: need for name, need in needs.items() if need}
    room = sum(min((int(node.get(name, 0) / need) for name, need in wanted.items()), default=0) for node in nodes)
    if room < 1:
        raise ConfigError(
            f"the Ray cluster's nodes have {[dict(node) for node in nodes]}, too little for one worker, which needs "
            f"{dict(needs)}"
        )
    return room
