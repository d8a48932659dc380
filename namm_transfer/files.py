"""Files that survive being killed at any moment: whole or not there, and lines that are on the disk once written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from namm_transfer.errors import DataError

__all__ = ["append_json", "read_yaml", "replacing", "whole_lines", "write_atomically"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when the block ends, and is removed if it fails.

    It has the suffix of `path`: some writers choose the format by it, or append their own.
    """
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a whole file or, if interrupted, nothing."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_yaml(file: Path) -> dict[str, Any]:
    """A configuration that was saved, its interpolations resolved when it was.

    Raises:
        DataError: the file cannot be read, or holds something else.
    """
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(file))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    if not isinstance(loaded, dict):
        raise DataError(f"{file} does not hold a configuration")
    return {str(key): value for key, value in loaded.items()}


def append_json(path: Path, record: Mapping[str, Any]) -> None:
    """Add one JSON line; it is on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file, none if there is no file; a last one torn by a kill is dropped, here and from the file."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(path, len(whole))
    return whole.splitlines()
