"""Run tasks under policies: the same units and seed under each, the rules at the budget that NAMM was seen to keep."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra.utils
import numpy as np
from hydra.errors import InstantiationException
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from namm_transfer.errors import ConfigError, NammTransferError
from namm_transfer.eval.executor import use_executor
from namm_transfer.eval.provenance import record
from namm_transfer.eval.results import OK, Row, RunFolder
from namm_transfer.eval.task import BASELINES, Task, Unit
from namm_transfer.network import NAMM
from namm_transfer.policies import NAMMPolicy, Policy, policy

__all__ = ["MATCHED", "Run", "build_policy", "build_task", "matched_budget"]

MATCHED = "matched"
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
        self.folder = RunFolder.open(path, dict(config))
        self.done = {row.key: row for row in self.folder.rows()}

    def __call__(self, console: Console) -> None:
        """Evaluate what is missing, writing each row as soon as it exists."""
        record(self.folder.path / "provenance.json", self._inputs(), self.seed)
        bars = (TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*bars, TextColumn("left"), TimeRemainingColumn(), console=console) as progress:
            bar = progress.add_task("", total=len(self.plan), completed=self.finished)
            for task in self.tasks:
                for column in self.columns:
                    if self._applies(task, column):
                        progress.update(bar, description=f"{task} · {column}")
                        for _ in self._evaluate(task, column):
                            progress.advance(bar)

    @property
    def finished(self) -> int:
        """How many rows of the plan exist."""
        return sum((task, column, unit.id, self.seed) in self.done for task, column, unit in self.plan)

    def _evaluate(self, name: str, column: str) -> Iterable[Row]:
        task = self.tasks[name]
        todo = [u for u in task.units(self.seed) if (name, column, u.id, self.seed) not in self.done]
        if todo:
            yield from self._outcomes(task, column, todo)
        chosen = self.policies[column]
        if not isinstance(chosen, str) and chosen.evicts:
            self._refuse_idle(name, column)

    def _outcomes(self, task: Task, column: str, todo: Sequence[Unit]) -> Iterable[Row]:
        chosen = self.policies[column]
        if self.config["policies"][column].get("budget") == MATCHED:
            chosen = self._build(column, matched_budget(self.done.values(), task.name))
        before = time.perf_counter()
        for outcome in task.evaluate(todo, chosen, self.seed):
            now = time.perf_counter()
            measured = asdict(outcome)
            unit = measured.pop("unit")
            row = Row(
                task=task.name,
                policy=column,
                unit=unit["id"],
                cluster=unit["cluster"],
                seed=self.seed,
                metric=task.metric,
                budget=None if isinstance(chosen, str) else chosen.budget,
                seconds=now - before,
                **measured,
            )
            self.folder.append(row)
            self.done[row.key] = row
            before = now
            yield row

    def _refuse_idle(self, name: str, column: str) -> None:
        """Raise if a policy that evicts never got to decide: it would have been the full cache under another name."""
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
        raise ConfigError(f"cannot build the task: {str(error).splitlines()[0]}") from error
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
    return float(np.mean(kept)) if kept else 1.0


def _ordered(policies: Mapping[str, Any]) -> list[str]:
    """Columns in their order, those with a matched budget last."""
    return sorted(policies, key=lambda column: policies[column].get("budget") == MATCHED)
