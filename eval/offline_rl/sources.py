"""Episodes from wherever they are stored, all of one type."""

from __future__ import annotations

from pathlib import Path

from namm_transfer.errors import DataError
from namm_transfer.eval.offline_rl.d4rl_data import load_d4rl
from namm_transfer.eval.offline_rl.episodes import Episode, load_episodes
from namm_transfer.eval.offline_rl.minari_data import MINARI, load_minari

__all__ = ["read_episodes"]


def read_episodes(source: Path | str) -> list[Episode]:
    """Read `FILE.npz` (of `save_episodes`), `FILE.hdf5` (D4RL's) or `minari:DATASET`.

    Raises:
        ConfigError: the library that reads it is not installed.
        DataError: it is none of these, or what it holds is no data set of episodes.
    """
    if str(source).startswith(MINARI):
        return load_minari(str(source).removeprefix(MINARI))
    path = Path(source)
    if path.suffix == ".npz":
        return load_episodes(path)
    if path.suffix in (".hdf5", ".h5"):
        return load_d4rl(path)
    raise DataError(f"{source} is no source of episodes; expected FILE.npz, FILE.hdf5 or minari:DATASET")
