"""Minari's data sets as typed episodes, and their references."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from namm_transfer.errors import ConfigError, DataError
from namm_transfer.eval.offline_rl.episodes import Episode
from namm_transfer.eval.offline_rl.scores import ReferenceReturns

__all__ = ["MINARI", "import_minari", "load_minari", "minari_references", "open_minari"]

MINARI = "minari:"
"""What a source of episodes begins with that is a Minari data set."""

_FAULTS = (OSError, ValueError, KeyError, RuntimeError)
"""What Minari and h5py raise for data sets that are absent or damaged."""


def import_minari() -> Any:
    """The module.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import minari
    except ImportError as error:
        raise ConfigError("Minari's data sets need minari: pip install 'namm-transfer[minari]'") from error
    return minari


def open_minari(dataset_id: str, *, download: bool = False) -> Any:
    """Minari's own object of a data set.

    Raises:
        ConfigError: minari is not installed.
        DataError: there is no such data set, or it cannot be read.
    """
    try:
        return import_minari().load_dataset(dataset_id, download=download)
    except _FAULTS as error:
        raise _unreadable(dataset_id, error) from error


def load_minari(dataset_id: str, *, download: bool = False) -> list[Episode]:
    """Read a Minari data set, such as `mujoco/hopper/expert-v0`.

    An episode's `seed` is its number in the data set. Minari keeps the observation after the last action too; it is
    left out, as everywhere here.

    Args:
        dataset_id: as Minari names it; the folder of data sets is Minari's own (MINARI_DATASETS_PATH).
        download: fetch it unless it is there.

    Raises:
        ConfigError: minari is not installed.
        DataError: there is no such data set, it cannot be read, its observations or actions are no plain vectors, or
            an episode's arrays do not fit each other, hold a value that is not finite, or end in its midst.
    """
    dataset = open_minari(dataset_id, download=download)
    episodes = []
    for data in _iterate(dataset, dataset_id):
        where = f"{dataset_id}, episode {data.id}"
        for name in ("observations", "actions"):
            if not isinstance(getattr(data, name), np.ndarray):
                raise DataError(f"{where}: {name} are {type(getattr(data, name)).__name__}; expected plain vectors")
        if len(data.observations) != len(data.rewards) + 1:
            raise DataError(
                f"{where} has {len(data.observations)} observations for {len(data.rewards)} rewards; expected one more"
            )
        ended = np.asarray(data.terminations, bool) | np.asarray(data.truncations, bool)
        if len(ended) != len(data.rewards) or ended[:-1].any():
            raise DataError(
                f"{where}: {len(ended)} flags for {len(data.rewards)} timesteps, or one ends it in its midst"
            )
        episodes.append(
            Episode(
                int(data.id),
                data.observations[:-1].astype(np.float32),
                data.actions.astype(np.float32),
                data.rewards.astype(np.float64),
                bool(data.terminations[-1]) if len(ended) else False,
                bool(data.truncations[-1]) if len(ended) else False,
            )
        )
    if not episodes:
        raise DataError(f"{dataset_id} holds no episodes")
    return episodes


def minari_references(dataset_id: str) -> ReferenceReturns:
    """The returns between which Minari scores a data set; they are of its environment and version only.

    Raises:
        ConfigError: minari is not installed.
        DataError: there is no such data set here, or it tells no references or no environment.
    """
    dataset = open_minari(dataset_id)
    metadata, env_spec = dataset.storage.metadata, dataset.spec.env_spec
    low, high = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    if env_spec is None or low is None or high is None:
        raise DataError(f"{dataset_id} tells no environment, or no ref_min_score and ref_max_score")
    return ReferenceReturns(env_spec.id, float(low), float(high), f"Minari, {dataset_id}")


def _iterate(dataset: Any, dataset_id: str) -> Iterator[Any]:
    """The data set's own episodes; it reads a file that may be damaged only now."""
    episodes = iter(dataset.iterate_episodes())
    while True:
        try:
            data = next(episodes, None)
        except _FAULTS as error:
            raise _unreadable(dataset_id, error) from error
        if data is None:
            return
        yield data


def _unreadable(dataset_id: str, error: Exception) -> DataError:
    return DataError(f"cannot read the Minari data set {dataset_id!r}: {type(error).__name__}: {error}")
