"""Episodes from wherever they are stored, all of one type."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from namm_transfer.errors import DataError
from namm_transfer.eval.offline_rl.d4rl_data import load_d4rl
from namm_transfer.eval.offline_rl.episodes import Episode, load_episodes
from namm_transfer.eval.offline_rl.minari_data import MINARI, load_minari, open_minari
from namm_transfer.eval.offline_rl.rollout import make_envs

__all__ = ["check_environment", "read_episodes"]

_HDF5 = (".hdf5", ".h5")


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
    if path.suffix in _HDF5:
        return load_d4rl(path)
    raise DataError(f"{source} is no source of episodes; expected FILE.npz, FILE.hdf5 or minari:DATASET")


def check_environment(source: Path | str, episodes: Sequence[Episode], env_id: str) -> None:
    """Make sure that episodes are of an environment: as far as their source tells it, and by their widths.

    Raises:
        DataError: they are of another one, or of another version of it, whose rewards are others.
    """
    told = None
    if str(source).startswith(MINARI):
        spec = open_minari(str(source).removeprefix(MINARI)).spec.env_spec
        told = None if spec is None else spec.id
    elif Path(source).suffix in _HDF5 and env_id.endswith("-v5"):
        told = "a version before v5, as all of D4RL's"
    if told not in (None, env_id):
        raise DataError(f"{source} holds episodes of {told}; expected {env_id}: rewards are not the same")
    with closing(make_envs(env_id, 1)) as envs:
        spaces = (envs.single_observation_space.shape, envs.single_action_space.shape)
    found = (episodes[0].observations.shape[1:], episodes[0].actions.shape[1:])
    if found != spaces:
        raise DataError(
            f"{source} holds observations {found[0]} and actions {found[1]}; {env_id} has {spaces[0]} and {spaces[1]}"
        )
