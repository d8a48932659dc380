"""Which language model a result came about with."""

from __future__ import annotations

from pathlib import Path

from transformers.utils.hub import cached_file

from namm_transfer.errors import DataError
from namm_transfer.eval.provenance import digest
from namm_transfer.evolution.hosts import PACKAGED_HOSTS

__all__ = ["language_model"]


def language_model(name: str) -> str:
    """What a language model is: a packaged one by its name, which stands for a pinned version; a folder by its digest;
    one of the Hub by its id and commit.

    Raises:
        DataError: its configuration cannot be fetched.
    """
    if name in PACKAGED_HOSTS:
        return name
    if Path(name).is_dir():
        return digest(Path(name))
    try:
        config = Path(str(cached_file(name, "config.json")))
    except (OSError, ValueError) as error:
        raise DataError(
            f"language model {name!r} is none of {sorted(PACKAGED_HOSTS)}, no folder, and its config.json could not be "
            f"read from the Hub: {error}"
        ) from error
    return f"{name}@{config.parent.name}"  # the Hub's cache has a folder for each commit
