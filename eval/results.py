"""The results of a run: one JSON line per unit, on disk as soon as it exists, from which a run resumes."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from namm_transfer.configs import flatten
from namm_transfer.errors import ConfigError, DataError
from namm_transfer.files import append_json, read_yaml, whole_lines, write_atomically

__all__ = ["OK", "UNDECODABLE", "Row", "RunFolder"]

OK, UNDECODABLE = "ok", "undecodable"


@dataclass(frozen=True)
class Row:
    """One unit under one policy and seed.

    `score` is in the unit named by `metric`. `kept_fraction` is retained / seen at the end of the unit,
    `kept_at_updates` its mean just after the decisions (None: the unit was too short for one), `tokens_seen` by the
    memory, `budget` what a rule was given, `seconds` the time since the row before (units evaluated together share it
    unevenly). None: not measured.
    """

    task: str
    policy: str
    unit: str
    cluster: str
    seed: int
    status: str
    metric: str
    score: float | None = None
    kept_fraction: float | None = None
    kept_at_updates: float | None = None
    tokens_seen: int | None = None
    bytes_kv: int | None = None
    bytes_total: int | None = None
    budget: float | int | None = None
    seconds: float | None = None
    error: str = ""
    detail: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status == OK and (self.score is None or not math.isfinite(self.score)):
            raise DataError(f"{self.task}, {self.policy}, {self.unit}: expected a finite score, got {self.score}")

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What a run holds at most once."""
        return (self.task, self.policy, self.unit, self.seed)


class RunFolder:
    """A folder with `config.yaml`, `rows.jsonl` and the report; a later run of the same config goes on in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = path / "rows.jsonl"

    @classmethod
    def open(cls, path: Path, config: dict[str, Any]) -> RunFolder:
        """Create the folder, or go on in one that holds the same resolved `config`, but for `policies` that are new.

        Raises:
            DataError: the path is not a folder, or holds something else than a run.
            ConfigError: the folder belongs to another configuration; the first difference is named.
        """
        if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not (path / "config.yaml").is_file())):
            raise DataError(f"{path} exists and is no folder of a run (no config.yaml); choose another with out=...")
        folder = cls(path)
        if (path / "config.yaml").is_file():
            stored = folder.config()
            folder._refuse_other(stored, config)
            if stored == config:
                return folder
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
        return folder

    def config(self) -> dict[str, Any]:
        """The resolved configuration of the run.

        Raises:
            DataError: the folder holds no run, or a damaged one.
        """
        file = self.path / "config.yaml"
        if not file.is_file():
            raise DataError(f"{self.path} holds no run: there is no config.yaml")
        return read_yaml(file)

    def rows(self) -> list[Row]:
        """Every finished row; a last line torn by a kill is dropped, here and from the file.

        Raises:
            DataError: an earlier line is no row.
        """
        names, rows = {f.name for f in fields(Row)}, []
        for number, line in enumerate(whole_lines(self.lines), start=1):
            try:
                values = json.loads(line)
                rows.append(Row(**{key: value for key, value in values.items() if key in names}))
            except (ValueError, TypeError, AttributeError) as error:
                raise DataError(f"{self.lines}, line {number} is no result row: {error}") from error
        return rows

    def append(self, row: Row) -> None:
        """Write one row through to the disk."""
        append_json(self.lines, asdict(row))

    def _refuse_other(self, stored: dict[str, Any], config: dict[str, Any]) -> None:
        # A new policy is a new column: it changes nothing in the rows of the others.
        policies, known = config.get("policies") or {}, stored.get("policies") or {}
        old = {name: settings for name, settings in policies.items() if name in known}
        ours, theirs = dict(flatten({**config, "policies": old})), dict(flatten({**stored, "policies": known}))
        for key in [*theirs, *ours]:
            if ours.get(key) != theirs.get(key) or (key in ours) != (key in theirs):
                held = repr(theirs[key]) if key in theirs else "not set"
                given = repr(ours[key]) if key in ours else "not set"
                raise ConfigError(
                    f"{self.path} holds a run of another configuration: {key} is {held} there, {given} here; "
                    "choose another folder with out=..."
                )
