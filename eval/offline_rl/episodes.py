"""Typed episodes and their files.

Shapes: T timesteps of one episode, O observation width, A action width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from namm_transfer.errors import DataError
from namm_transfer.files import replacing

_AXES = {
    "seed": (1, "iu"),
    "length": (1, "iu"),
    "terminated": (1, "b"),
    "truncated": (1, "b"),
    "observations": (2, "fiu"),
    "actions": (2, "fiu"),
    "rewards": (1, "fiu"),
}
"""Arrays of a file: their axes, and the kinds of numbers that they may hold."""


@dataclass(frozen=True)
class Episode:
    """One episode as played: action t answers observation t and earns reward t.

    Attributes:
        seed: the seed of the environment's reset; the number in the data set where that does not tell it.
        observations: [T, O] float32, the observation before each action (the final one is not kept).
        actions: [T, A] float32.
        rewards: [T] float64.
        terminated: the environment ended the episode (Hopper: it fell).
        truncated: the time limit ended it; both may hold.

    Raises:
        DataError: shapes disagree, T is 0, a value is not finite, or nothing ended the episode.
    """

    seed: int
    observations: NDArray[np.float32]
    actions: NDArray[np.float32]
    rewards: NDArray[np.float64]
    terminated: bool
    truncated: bool

    def __post_init__(self) -> None:
        for name, rank in (("observations", 2), ("actions", 2), ("rewards", 1)):
            array = getattr(self, name)
            if array.ndim != rank or len(array) != len(self.rewards) or len(array) == 0:
                raise DataError(
                    f"episode of seed {self.seed}: {name} has shape {array.shape}; expected {rank} axes and "
                    f"T = {len(self.rewards)} > 0 rows"
                )
            if not np.isfinite(array).all():
                raise DataError(f"episode of seed {self.seed}: {name} holds a value that is not finite")
        if not (self.terminated or self.truncated):
            raise DataError(f"episode of seed {self.seed} is neither terminated nor truncated")

    @property
    def length(self) -> int:
        """T, in timesteps."""
        return len(self.rewards)

    @property
    def return_raw(self) -> float:
        """The undiscounted sum of rewards, in the environment's own unit."""
        return float(self.rewards.sum())

    def returns_to_go(self) -> NDArray[np.float64]:
        """Return [T]: at t the sum of the rewards from t to the end."""
        return np.cumsum(self.rewards[::-1])[::-1].copy()


def best_return(episodes: Sequence[Episode], share: float) -> float:
    """Mean return of the best episodes, as many as it takes to hold this share of all timesteps.

    Raises:
        DataError: there are no episodes.
    """
    if not episodes:
        raise DataError("no episodes: there is no best return")
    wanted = share * sum(episode.length for episode in episodes)
    best, timesteps = [], 0
    for episode in sorted(episodes, key=lambda one: one.return_raw, reverse=True):
        best.append(episode.return_raw)
        timesteps += episode.length
        if timesteps >= wanted:
            break
    return float(np.mean(best))


def save_episodes(path: Path, episodes: Sequence[Episode]) -> None:
    """Write episodes to one compressed npz file, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        np.savez_compressed(
            partial,
            seed=np.array([e.seed for e in episodes], np.int64),
            length=np.array([e.length for e in episodes], np.int64),
            terminated=np.array([e.terminated for e in episodes], np.bool_),
            truncated=np.array([e.truncated for e in episodes], np.bool_),
            observations=np.concatenate([e.observations for e in episodes]),
            actions=np.concatenate([e.actions for e in episodes]),
            rewards=np.concatenate([e.rewards for e in episodes]),
        )


def load_episodes(path: Path) -> list[Episode]:
    """Read a file of `save_episodes`.

    Raises:
        DataError: the file is missing, truncated or no npz; or an array in it is missing, no numbers, or of the wrong
            length or number of axes; or what it holds is no episode.
    """
    if not path.is_file():
        raise DataError(f"no episodes at {path}; save_episodes writes them")
    try:
        with np.load(path) as file:
            if missing := set(_AXES) - set(file.files):
                raise DataError(f"{path} lacks {', '.join(sorted(missing))}; it holds {', '.join(file.files)}")
            stored = {name: file[name] for name in _AXES}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise DataError(f"{path} is truncated or no file of save_episodes: {error}") from error
    for name, (rank, kinds) in _AXES.items():
        if stored[name].ndim != rank or stored[name].dtype.kind not in kinds:
            raise DataError(f"{path}: {name} is {stored[name].dtype} with {stored[name].ndim} axes; expected {rank}")
    ends, steps = np.cumsum(stored["length"]), ("observations", "actions", "rewards")
    if not len(ends) or any(len(stored[name]) != ends[-1] for name in steps):
        raise DataError(f"{path}: the lengths of its {len(ends)} episodes do not add up to its arrays")
    if any(len(stored[name]) != len(ends) for name in ("seed", "terminated", "truncated")):
        raise DataError(f"{path}: it has {len(ends)} lengths, but seeds or flags of another number of episodes")
    parts = (np.split(stored[name], ends[:-1]) for name in ("observations", "actions", "rewards"))
    flags = (stored[name].tolist() for name in ("seed", "terminated", "truncated"))
    try:
        return [
            Episode(seed, observations, actions, rewards, terminated, truncated)
            for seed, terminated, truncated, observations, actions, rewards in zip(*flags, *parts, strict=True)
        ]
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
