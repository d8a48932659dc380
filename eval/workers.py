"""Other processes that evaluate, of this machine or of a Ray cluster; rows come back as soon as they exist."""

from __future__ import annotations

import functools
import json
import os
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import hydra.utils
import torch
from hydra.errors import InstantiationException

from namm_transfer.errors import ConfigError, DataError, NammTransferError
from namm_transfer.eval.results import Row
from namm_transfer.eval.task import BASELINES, Task
from namm_transfer.network import NAMM
from namm_transfer.policies import Policy, policy
from namm_transfer.processes import begin, worker_context

__all__ = ["Job", "Workers", "build_policy", "build_task", "rows_of", "use_workers"]


@dataclass(frozen=True)
class Job:
    """Some units of a task under the policy of one column, all as plain settings, so that it can be sent anywhere."""

    task: Mapping[str, Any]
    column: str
    policy: Mapping[str, Any]
    units: tuple[str, ...]
    seed: int


Workers = Callable[[Iterable[Job]], Iterator[Row]]


def use_workers(executor: Mapping[str, Any]) -> Workers | None:
    """What an executor's settings ask for; None: no other process.

    Args:
        executor: `name` ("local" or "ray"); `workers`, how many local processes; on Ray `address`, `cpus_per_worker`
            and `gpus_per_worker`.

    Raises:
        ConfigError: the number of workers is none, or Ray is not installed.
    """
    if executor.get("name", "local") == "ray":
        from namm_transfer.eval.ray_workers import ray_workers

        return functools.partial(ray_workers, executor)
    workers = executor.get("workers", 1)
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ConfigError(f"executor.workers is {workers!r}; expected an integer of at least 1")
    return functools.partial(_processes, workers) if workers > 1 else None


def rows_of(job: Job, task: Task | None = None) -> Iterator[Row]:
    """Evaluate a job in this process, whose `task` may be there already."""
    task, baseline = task or _task(json.dumps(job.task)), job.policy["name"] in BASELINES
    chosen: Policy | str = str(job.policy["name"]) if baseline else build_policy(job.policy)
    wanted = set(job.units)
    before = time.perf_counter()
    for outcome in task.evaluate([u for u in task.units(job.seed) if u.id in wanted], chosen, job.seed):
        now = time.perf_counter()
        measured = asdict(outcome)
        unit = measured.pop("unit")
        yield Row(
            task=task.name,
            policy=job.column,
            unit=unit["id"],
            cluster=unit["cluster"],
            seed=job.seed,
            metric=task.metric,
            budget=None if isinstance(chosen, str) else chosen.budget,
            seconds=now - before,
            **measured,
        )
        before = now


def build_task(settings: Mapping[str, Any]) -> Task:
    """The task that `settings["_target_"]` names.

    Raises:
        ConfigError: the class does not exist or does not take these settings.
    """
    if "_target_" not in settings:
        raise ConfigError(f"cannot build the task: there is no _target_ in {dict(settings)}")
    try:
        task: Task = hydra.utils.instantiate(settings)
    except InstantiationException as error:
        if isinstance(error.__cause__, NammTransferError):
            raise error.__cause__ from error
        reason = "" if error.__cause__ is None else f" {error.__cause__}"  # on the lines that follow the first one
        raise ConfigError(f"cannot build the task: {str(error).splitlines()[0]}{reason}") from error
    return task


def build_policy(settings: Mapping[str, Any]) -> Policy:
    """The policy that `settings` describe; `namm` is loaded from its name or path.

    Raises:
        ConfigError: an option the policy does not have, or a value out of its range.
    """
    if "name" not in settings:
        raise ConfigError(f"a policy needs a name; got {dict(settings)}")
    options = {key: value for key, value in settings.items() if key != "name"}
    if "namm" in options:
        options["namm"] = NAMM.from_pretrained(options["namm"])
    return policy(settings["name"], **options)


@functools.lru_cache(maxsize=4)
def _task(settings: str) -> Task:
    """A task and its host, which are dear to load."""
    return build_task(json.loads(settings))


def _processes(workers: int, jobs: Iterable[Job]) -> Iterator[Row]:
    """Raises what a job raised, once the rows that were finished before it are handed out."""
    if not (todo := list(jobs)):
        return
    context = worker_context()
    with context.Manager() as manager:
        rows = manager.Queue()
        with ProcessPoolExecutor(workers, context, _start, (rows, torch.get_num_threads(), dict(os.environ))) as pool:
            futures = [pool.submit(_put_rows, job) for job in todo]
            try:
                yield from _until_done(rows, futures)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def _until_done(rows: Any, futures: Sequence[Future[None]]) -> Iterator[Row]:
    while True:
        finished = all(future.done() for future in futures)
        failed = next((f for f in futures if f.done() and not f.cancelled() and f.exception()), None)
        try:
            while True:
                yield rows.get(timeout=0 if finished or failed else 0.1)
        except queue.Empty:
            pass
        if failed is not None:
            error = failed.exception()
            if isinstance(error, NammTransferError | KeyboardInterrupt):
                raise error
            raise DataError(f"a worker failed: {type(error).__name__}: {error}") from error
        if finished:
            return


_queue: list[Any] = []
"""Of a worker process: where its rows go."""


def _start(rows: Any, threads: int, environment: Mapping[str, str]) -> None:
    begin(environment)
    torch.set_num_threads(threads)
    _queue.append(rows)


def _put_rows(job: Job) -> None:
    for row in rows_of(job):
        _queue[0].put(row)
