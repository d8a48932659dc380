"""What a task is: units, each evaluated under one policy and seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from namm_transfer.errors import CheckpointError, ConfigError
from namm_transfer.eval.executor import check_device
from namm_transfer.eval.results import OK
from namm_transfer.layer import check_interval
from namm_transfer.policies import Policy
from namm_transfer.stats import MemoryStats

__all__ = [
    "BASELINES",
    "Outcome",
    "Task",
    "Unit",
    "check_settings",
    "host_folder",
    "kept_at_updates",
    "measured",
    "packaged_host",
]

BASELINES = ("window",)
"""Columns that are no policy: a host's own way to forget, evaluated on the tasks that have it."""


@dataclass(frozen=True)
class Unit:
    """The least thing that gets a score: a question, a clip, an episode."""

    id: str
    cluster: str
    """The video or episode it belongs to; units of one cluster are not independent."""


@dataclass(frozen=True)
class Outcome:
    """What came of a unit; the fields are those of a result row."""

    unit: Unit
    score: float | None = None
    status: str = OK
    kept_fraction: float | None = None
    kept_at_updates: float | None = None
    tokens_seen: int | None = None
    bytes_kv: int | None = None
    bytes_total: int | None = None
    error: str = ""
    detail: dict[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """A set of units and the host model that answers them.

    Attributes:
        name: names its rows, such as `video_qa/shapes`.
        metric: name of the score, with its unit where it has one (`return_raw`).
        baselines: those of `BASELINES` that its host has.
    """

    name: str
    metric: str
    baselines: tuple[str, ...]

    def units(self, seed: int) -> Sequence[Unit]:
        """All units; cheap, and the same for every policy."""
        ...

    def inputs(self) -> Mapping[str, str]:
        """Digest of everything read from disk (weights, videos) by name, for the provenance."""
        ...

    def evaluate(self, units: Sequence[Unit], policy: Policy | str, seed: int) -> Iterator[Outcome]:
        """Outcomes of `units`, each as soon as it is known; `policy` may be the name of a baseline.

        Input that cannot be decoded is an outcome with the status `undecodable`, not an exception.
        """
        ...


def measured(stats: MemoryStats, policy: Policy) -> dict[str, Any]:
    """The fields of an outcome that the statistics of a memory of one row fill."""
    return {
        "kept_fraction": stats.kept_fraction,
        "kept_at_updates": kept_at_updates(stats.kept_at_updates if stats.updates else None, policy),
        "tokens_seen": sum(stats.seen),
        "bytes_kv": stats.bytes["kv"],
        "bytes_total": stats.bytes["total"],
    }


def kept_at_updates(kept: float | None, policy: Policy) -> float | None:
    """What a row says of the fraction `kept` just after decisions, None where there was none.

    That is undefined, not 1: the policy never got to evict. Only a policy that never does keeps everything by its
    definition.
    """
    return kept if policy.evicts else 1.0


def check_settings(task: Any, packaged: Path | Mapping[str, Path], **limits: int) -> None:
    """Check a task's model settings, and the named settings, each from 1 to its limit, before anything is run.

    Raises:
        ConfigError: one is out of range.
        CheckpointError: there is no folder of the host.
    """
    for key, limit in limits.items():
        value = getattr(task, key)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise ConfigError(f"{task.name}: {key} is {value!r}; expected an integer from 1 to {limit}")
    check_interval(task.model["update_interval"])
    check_device(task.model["device"])
    host_folder(task.model, packaged)


def packaged_host(name: str, model: Mapping[str, Any], hosts: Mapping[str, Path]) -> Path:
    """Folder of the packaged host that a model's settings name, the first one if they name none.

    Args:
        name: of the task, for the message.

    Raises:
        ConfigError: it is none of `hosts`; the model is another task's.
    """
    host = model.get("host", next(iter(hosts)))
    if host not in hosts:
        raise ConfigError(f"{name}: model.host is {host!r}; expected one of {', '.join(hosts)}")
    return hosts[host]


def host_folder(model: Mapping[str, Any], packaged: Path | Mapping[str, Path]) -> Path:
    """The folder that a task's model settings name.

    Args:
        model: the settings; `path` is a folder, or a name.
        packaged: what `packaged` stands for; or the folder of each name that is no path.

    Raises:
        CheckpointError: there is no such folder.
    """
    names = {"packaged": packaged} if isinstance(packaged, Path) else packaged
    folder = names.get(model["path"], Path(model["path"]))
    if not folder.is_dir():
        listed = " or ".join(f"model.path={name}" for name in names)
        raise CheckpointError(f"no host model in {folder}: expected a folder, or {listed}")
    return folder
