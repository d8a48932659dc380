"""A durable journal: JSON lines that survive being killed at any moment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from namm_transfer.errors import ConfigError, DataError
from namm_transfer.files import append_json, whole_lines

__all__ = ["Journal"]


class Journal:
    """An append-only file of JSON lines whose first line says under which settings it was written.

    A line is on the disk when `append` returns. A last line that was cut off is dropped when the file is reopened.

    Args:
        path: the file; made when absent.
        header: settings; they must equal those of an existing file.

    Raises:
        ConfigError: the file was written under other settings.
        DataError: a line before the last is damaged.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = whole_lines(path)
        if not lines:
            append_json(path, {"event": "settings", **header})
            return
        first, *rest = (_parse(path, number, line) for number, line in enumerate(lines, 1))
        old = {name: value for name, value in first.items() if name != "event"}
        differences = [
            f"{name}: {old.get(name, 'absent')!r} in the file, {header.get(name, 'absent')!r} now"
            for name in sorted({*old, *header})
            if name not in old or name not in header or old[name] != header[name]
        ]
        if differences:
            raise ConfigError(f"{path} was begun with other settings and cannot be resumed: {'; '.join(differences)}")
        self.records = rest

    def of(self, event: str) -> list[dict[str, Any]]:
        """The records of one kind, oldest first."""
        return [record for record in self.records if record["event"] == event]

    def append(self, event: str, **values: Any) -> None:
        """Add a record and wait until it is on the disk."""
        record = {"event": event, **values}
        append_json(self.path, record)
        self.records.append(record)


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}, line {number}: no JSON object ({error})") from error
