"""Files are whole or not there; a torn line is dropped and the file goes on behind it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from namm_transfer.files import append_json, replacing, whole_lines, write_atomically


def test_a_failed_write_leaves_what_was_there_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    write_atomically(path, "first\n")
    with pytest.raises(RuntimeError), replacing(path) as partial:
        partial.write_text("half of the sec")
        raise RuntimeError
    assert path.read_text() == "first\n"
    assert list(tmp_path.iterdir()) == [path]


def test_writers_that_append_a_suffix_write_the_very_file(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.npy") as partial:
        np.save(partial, np.arange(3))
    assert np.load(tmp_path / "a.npy").tolist() == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


def test_a_torn_line_is_dropped_and_the_next_one_does_not_touch_it(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert whole_lines(path) == []
    append_json(path, {"n": 1})
    with path.open("a") as file:
        file.write('{"n": 2')
    assert [json.loads(line) for line in whole_lines(path)] == [{"n": 1}]
    append_json(path, {"n": 3})
    assert [json.loads(line)["n"] for line in whole_lines(path)] == [1, 3]


def test_values_that_json_has_not_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        append_json(tmp_path / "lines.jsonl", {"n": float("nan")})
    assert whole_lines(tmp_path / "lines.jsonl") == []
