"""The data sets of a behaviour run, after D4RL (Fu et al., 2020): expert, medium, medium-replay."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from namm_transfer.errors import ConfigError, DataError
from namm_transfer.eval.offline_rl.behaviour import environment_of
from namm_transfer.eval.offline_rl.collect import CollectionConfig, collect_episodes
from namm_transfer.eval.offline_rl.episodes import Episode, best_return
from namm_transfer.eval.offline_rl.measure import measure_policy

__all__ = ["DATA", "data_of", "policy_of", "return_to_ask"]

POLICIES = {"expert": "policy.zip", "medium": "medium.zip"}
REPLAY = "medium-replay"
DATA = (*POLICIES, REPLAY)
BEST = 0.1
"""Of data of all qualities, the share of the timesteps, best episodes first, that counts as good: the 10 %BC of Chen et
al., "Decision Transformer" (NeurIPS 2021). They ask for an expert's return, which such data need not hold anywhere."""


def policy_of(folder: Path, data: str = "expert") -> Path:
    """File of the policy that plays the data `expert` or `medium` of a behaviour run."""
    return folder / POLICIES[data]


def data_of(folder: Path, data: str, timesteps: int, *, dataset: str | None = None, progress: bool = True) -> str:
    """The source of a data set of a behaviour run (see `sources`), collected unless that was done before.

    Args:
        folder: of `train_behaviour`.
        data: one of `DATA`. Those of a policy become a Minari data set; medium-replay is what the run itself kept.
        timesteps: of an expert's or medium policy's episodes.
        dataset: the data set's id; None: `namm-transfer/ENVIRONMENT/DATA-v0`.

    Raises:
        CheckpointError, ConfigError: as `collect_episodes`, or `data` is unknown.
        DataError: the folder holds no run, or one that kept no such data.
    """
    env_id = environment_of(folder)
    if data not in DATA:
        raise ConfigError(f"data is {data!r}; expected one of {', '.join(DATA)}")
    path = folder / "medium-replay.npz" if data == REPLAY else policy_of(folder, data)
    if not path.is_file():
        raise DataError(
            f"{folder} has no {path.name}: `train behaviour` keeps it once an evaluation reaches its medium_return"
            if data != "expert"
            else f"{folder} has no {path.name}: `train behaviour` has not got to its first evaluation"
        )
    if data == REPLAY:
        return str(path)
    dataset = dataset or f"namm-transfer/{env_id.lower()}/{data}-v0"
    return collect_episodes(CollectionConfig(path, dataset, env_id, timesteps), progress=progress)


def return_to_ask(
    folder: Path, data: str, episodes: Sequence[Episode], seeds: Sequence[int], num_envs: int, *, progress: bool = True
) -> float:
    """What a host of this data is asked for: the mean return of the policy that played it, without noise; where many
    policies did, that of the best episodes (see `BEST`)."""
    if data == REPLAY:
        return best_return(episodes, BEST)
    return measure_policy(policy_of(folder, data), environment_of(folder), seeds, num_envs, progress=progress).mean
