"""Evaluation on a Ray cluster: a job is a task of Ray's that streams its rows, and runs again where its worker died."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from namm_transfer.errors import ConfigError, DataError, NammTransferError
from namm_transfer.eval.results import Row
from namm_transfer.eval.workers import Job, rows_of

__all__ = ["ray_workers"]


def ray_workers(executor: Mapping[str, Any], jobs: Iterable[Job]) -> Iterator[Row]:
    """Rows of all jobs as they come. Those of a job that ran again come again.

    Args:
        executor: as `use_workers` takes it.

    Raises:
        ConfigError: Ray is not installed.
        DataError: a job failed for another reason than its settings.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError("executor=ray needs Ray: pip install 'namm-transfer[ray]'") from error
    started = not ray.is_initialized()
    if started:
        ray.init(address=executor.get("address"), log_to_driver=False, include_dashboard=False)
    needs = {"num_cpus": executor.get("cpus_per_worker", 1), "num_gpus": executor.get("gpus_per_worker", 0)}
    remote: Any = ray.remote(num_returns="streaming", max_retries=3, **needs)(_rows)
    try:
        streams: list[Any] = [remote.remote(job, torch.get_num_threads()) for job in jobs]
        while streams:
            ready, _ = ray.wait(streams, timeout=1.0, fetch_local=False)
            for stream in list[Any](ready):
                try:
                    row: Any = ray.get(next(stream))
                    yield row
                except StopIteration:
                    streams.remove(stream)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, NammTransferError):
            raise cause from error
        raise DataError(f"a worker failed: {type(cause).__name__}: {cause}") from error
    finally:
        if started:
            ray.shutdown()


def _rows(job: Job, threads: int) -> Iterator[Row]:
    torch.set_num_threads(threads)
    yield from rows_of(job)
