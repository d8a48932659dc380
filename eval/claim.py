"""A folder belongs to one configuration, which is written beside its data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from namm_transfer.errors import ConfigError, DataError
from namm_transfer.files import write_atomically


def claim(record: Path, settings: Mapping[str, Any]) -> None:
    """Write `settings` to the file `record`, or make sure that it holds the same.

    Raises:
        ConfigError: it holds others; the names of those that differ are listed.
        DataError: it cannot be read.
    """
    given = as_stored(settings)
    if not record.exists():
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(record, json.dumps(given, indent=2) + "\n")
        return
    try:
        stored = dict(json.loads(record.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{record} cannot be read: {error}") from error
    if stored != given:
        changed = ", ".join(differing(stored, given))
        raise ConfigError(f"{record.parent} holds a run with other values of {changed}; use a new folder")


def as_stored(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they come back from a file: tuples are lists there."""
    found: dict[str, Any] = json.loads(json.dumps(settings))
    return found


def differing(stored: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Names of the settings that are not the same in both."""
    return sorted(key for key in {*stored, *given} if stored.get(key) != given.get(key))
