"""Run tasks under policies: the same units and seed under each, the rules at the budget that NAMM was seen to keep."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from namm_transfer.errors import ConfigError
from namm_transfer.eval.executor import use_executor
from namm_transfer.eval.provenance import record
from namm_transfer.eval.results import OK, Row, RunFolder
from namm_transfer.eval.task import BASELINES, Task, Unit
from namm_transfer.eval.workers import Job, build_policy, build_task, rows_of, use_workers
from namm_transfer.policies import NAMMPolicy, Policy

__all__ = ["MATCHED", "REFERENCE", "Run", "matched_budget"]

MATCHED = "matched"
_SHARES = 4
"""Jobs of a column: several, so that workers end at about the same time; few, since a job's units may be batched."""
REFERENCE = "namm"
"""The column whose measured kept fraction the policies with a matched budget get."""


class Run:
    """Every task of a configuration under every policy of it, into one folder.

    Args:
        config: resolved; `tasks`, `policies` by the name of their column, `seed`, `executor`.
        path: the folder; what is already there is not evaluated again.

    Raises:
        ConfigError: a task or a policy cannot be built from the configuration, or the folder holds a run of another.
        DataError: the path is no folder of a run.
    """

    def __init__(self, config: Mapping[str, Any], path: Path) -> None:
        if lacking := {"tasks", "policies", "seed", "executor"} - set(config):
            raise ConfigError(f"this is no configuration of an evaluation: it lacks {', '.join(sorted(lacking))}")
        self.config, self.seed = config, config["seed"]
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ConfigError(f"seed is {self.seed!r}; expected an integer of at least 0")
        for group in ("tasks", "policies"):
            for column, settings in config[group].items():
                if not isinstance(settings, Mapping):
                    raise ConfigError(
                        f"{group}.{column} is {settings!r}; expected settings (to leave it out: ~{group}.{column})"
                    )
        use_executor(config["executor"])
        tasks = [build_task(settings) for settings in config["tasks"].values()]
        self.tasks = {task.name: task for task in tasks}
        if len(self.tasks) < len(tasks):
            raise ConfigError(f"two tasks share a name: {', '.join(task.name for task in tasks)}")
        self.columns = _ordered(config["policies"])
        # Refuse a bad policy before hours have gone into the good ones.
        self.policies = {column: self._build(column, matched=0.5) for column in self.columns}
        self.plan = [
            (task, column, unit)
            for task in self.tasks
            for column in self.columns
            if self._applies(task, column)
            for unit in self.tasks[task].units(self.seed)
        ]
        if not self.plan:
            raise ConfigError(
                f"nothing to do: none of {', '.join(self.tasks)} has the columns {', '.join(self.columns)}"
            )
        self._workers = use_workers(config["executor"])
        # how many evaluate, and where, changes no result: a run may be resumed elsewhere
        executor = {key: value for key, value in config["executor"].items() if key in ("device", "threads")}
        self.folder = RunFolder.open(path, {**config, "executor": executor})
        self.done = {row.key: row for row in self.folder.rows()}

    def __call__(self, console: Console) -> None:
        """Evaluate what is missing, writing each row as soon as it exists."""
        record(self.folder.path / "provenance.json", self._inputs(), self.seed)
        bars = (TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*bars, TextColumn("left"), TimeRemainingColumn(), console=console) as progress:
            bar = progress.add_task("", total=len(self.plan), completed=self.finished)
            for matched in (False, True):  # the rules at the measured budget, once it is measured
                for row in self._rows(matched):
                    if row.key not in self.done:  # what a worker that died had sent comes again
                        self.folder.append(row)
                        self.done[row.key] = row
                        progress.update(bar, advance=1, description=f"{row.task} · {row.policy}")
                self._refuse_idle(matched)

    @property
    def finished(self) -> int:
        """How many rows of the plan exist."""
        return sum((task, column, unit.id, self.seed) in self.done for task, column, unit in self.plan)

    def _rows(self, matched: bool) -> Iterator[Row]:
        """Rows of what is missing of the columns with a matched budget, or of the others."""
        if self._workers is not None:
            yield from self._workers(job for _, job in self._jobs(matched, _SHARES))
            return
        for task, job in self._jobs(matched, 1):
            yield from rows_of(job, task)

    def _jobs(self, matched: bool, shares: int) -> Iterator[tuple[Task, Job]]:
        """A column's units are cut into up to `shares` jobs, never within a cluster."""
        for task, settings in zip(self.tasks.values(), self.config["tasks"].values(), strict=True):
            for column in self._columns(task.name, matched):
                todo = [u for u in task.units(self.seed) if (task.name, column, u.id, self.seed) not in self.done]
                chosen = dict(self.config["policies"][column])
                if matched:
                    chosen["budget"] = matched_budget(self.done.values(), task.name)
                for units in _parts(todo, shares):
                    yield task, Job(settings, column, chosen, units, self.seed)

    def _columns(self, task: str, matched: bool) -> list[str]:
        return [
            column
            for column in self.columns
            if self._applies(task, column) and (self.config["policies"][column].get("budget") == MATCHED) is matched
        ]

    def _refuse_idle(self, matched: bool) -> None:
        """Raise if a policy that evicts never got to decide: it would have been the full cache under another name."""
        for name in self.tasks:
            for column in self._columns(name, matched):
                chosen = self.policies[column]
                if not isinstance(chosen, str) and chosen.evicts:
                    self._refuse_idle_column(name, column)

    def _refuse_idle_column(self, name: str, column: str) -> None:
        rows = [r for r in self.done.values() if (r.task, r.policy, r.status) == (name, column, OK)]
        if rows and all(row.kept_at_updates is None for row in rows):
            interval = (getattr(self.tasks[name], "model", None) or {}).get("update_interval")
            seen = [row.tokens_seen for row in rows if row.tokens_seen is not None]
            raise ConfigError(
                f"{name}: policy {column!r} took no decision in any of {len(rows)} units: model.update_interval is "
                f"{interval}, the units have {min(seen, default='?')} to {max(seen, default='?')} tokens; choose a "
                "smaller interval, and another folder with out=..."
            )

    def _applies(self, task: str, column: str) -> bool:
        chosen = self.policies[column]
        return not isinstance(chosen, str) or chosen in self.tasks[task].baselines

    def _build(self, column: str, matched: float) -> Policy | str:
        """The policy of a column, or the name of the baseline that it is."""
        settings = dict(self.config["policies"][column])
        if "name" not in settings:
            raise ConfigError(f"policies.{column} has no name: expected a policy, or one of {', '.join(BASELINES)}")
        if settings["name"] in BASELINES:
            return str(settings["name"])
        if settings.get("budget") == MATCHED:
            reference = self.config["policies"].get(REFERENCE, {})
            if reference.get("name") != REFERENCE:
                raise ConfigError(f"policies.{column}.budget={MATCHED} needs a column {REFERENCE!r} to match")
            if reference.get("budget") == MATCHED:
                raise ConfigError(
                    f"policies.{REFERENCE}.budget is {MATCHED!r}, but this column is what others are matched to: "
                    "expected null, or a budget of its own"
                )
            settings["budget"] = matched
        return build_policy(settings)

    def _inputs(self) -> dict[str, str]:
        inputs: dict[str, str] = {}
        for name, task in self.tasks.items():
            inputs |= {f"{name}: {what}": value for what, value in task.inputs().items()}
        for column, chosen in self.policies.items():
            if isinstance(chosen, NAMMPolicy):
                inputs[f"policy {column}: parameters"] = chosen.namm.fingerprint()
        return inputs


def matched_budget(rows: Iterable[Row], task: str) -> float:
    """The fraction that NAMM was measured to keep just after its decisions on a task.

    The mean over units, each with the same weight however many decisions it had; a unit without one is left out, since
    a rule takes none on it either. 1.0 where every unit is undecodable: then no rule gets to use its budget.

    Raises:
        ConfigError: units were evaluated, but none had a decision.
    """
    units = [row for row in rows if (row.task, row.policy, row.status) == (task, REFERENCE, OK)]
    kept = [row.kept_at_updates for row in units if row.kept_at_updates is not None]
    if units and not kept:
        raise ConfigError(f"{task}: {REFERENCE!r} took no decision in {len(units)} units, so there is none to match")
    return math.fsum(kept) / len(kept) if kept else 1.0  # the same in whatever order the rows came


def _parts(units: Sequence[Unit], count: int) -> Iterator[tuple[str, ...]]:
    """Cut units into up to `count` parts of about as many clusters each."""
    clusters: dict[str, list[str]] = {}
    for unit in units:
        clusters.setdefault(unit.cluster, []).append(unit.id)
    for part in np.array_split(np.array(list(clusters), dtype=object), min(count, len(clusters)) or 1):
        if len(part):
            yield tuple(unit for cluster in part for unit in clusters[cluster])


def _ordered(policies: Mapping[str, Any]) -> list[str]:
    """Columns in their order, those with a matched budget last."""
    return sorted(policies, key=lambda column: policies[column].get("budget") == MATCHED)
