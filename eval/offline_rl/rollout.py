"""Play episodes of an agent in vectorised environments, each with a seed of its own.

Shapes: E environments (rows), O observation width, A action width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from numpy.typing import NDArray

from namm_transfer.errors import ConfigError, DataError
from namm_transfer.eval.offline_rl.episodes import Episode


class Agent(Protocol):
    """What plays: one agent serves all rows at once and keeps each row's episode apart."""

    def reset(self, rows: NDArray[np.intp]) -> None:
        """Forget the episodes of `rows`; a new one starts there with the next `act`."""

    def act(self, observations: NDArray[np.floating], rewards: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return actions [E, A] for observations [E, O].

        `rewards` [E] is what each row's previous action earned (0 in an episode's first step).
        """


class RandomAgent:
    """Actions drawn uniformly from the action space: the floor of every score."""

    def __init__(self, envs: VectorEnv, generator: np.random.Generator) -> None:
        self.low, self.high = action_bounds(envs)
        self.generator = generator

    def reset(self, rows: NDArray[np.intp]) -> None:
        """Nothing to forget."""

    def act(self, observations: NDArray[np.floating], rewards: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return actions [E, A]; neither argument is looked at beyond E."""
        size = (len(observations), len(self.low))
        return self.generator.uniform(self.low, self.high, size).astype(np.float32)


@dataclass(frozen=True)
class EpisodeRecord:
    """A finished episode: `return_raw` is the sum of rewards, `length` counts timesteps."""

    seed: int
    return_raw: float
    length: int
    terminated: bool
    truncated: bool


def make_envs(env_id: str, num_envs: int) -> SyncVectorEnv:
    """Make `num_envs` copies of a registered environment that reset only when told to.

    Raises:
        ConfigError: `num_envs` is less than 1, or gymnasium does not know `env_id` or no longer has it.
    """
    if num_envs < 1:
        raise ConfigError(f"num_envs is {num_envs}; expected at least 1")
    try:
        spec = gymnasium.spec(env_id)
    except gymnasium.error.Error as error:
        raise ConfigError(f"gymnasium knows no environment {env_id!r}: {error}") from error
    try:
        return SyncVectorEnv(
            [lambda: gymnasium.make(spec, disable_env_checker=True)] * num_envs,
            autoreset_mode=AutoresetMode.DISABLED,
        )
    except (ImportError, gymnasium.error.Error) as error:  # v2 and v3 of MuJoCo's are still listed
        raise ConfigError(f"the environment {env_id!r} cannot be made: {error}") from error


def rollout(agent: Agent, envs: VectorEnv, seeds: Iterable[int]) -> Iterator[EpisodeRecord]:
    """Play one episode for each seed and yield its record as soon as it finishes (not in seed order).

    A run resumes by passing only the seeds that have no record yet.

    Raises:
        ConfigError, DataError: as `play`.
    """
    for episode in play(agent, envs, seeds):
        yield EpisodeRecord(episode.seed, episode.return_raw, episode.length, episode.terminated, episode.truncated)


def play(agent: Agent, envs: VectorEnv, seeds: Iterable[int]) -> Iterator[Episode]:
    """Play one episode for each seed and yield it whole as soon as it finishes.

    A row that finishes takes the next seed at once. When none is left the row idles: it is reset and goes on
    stepping, because the others need the vector to step, and what it does is dropped. An episode is yielded before
    anything else is asked of the agent or of the environments: whatever fails later, it is kept.

    Raises:
        ConfigError: `envs` reset on their own, which would draw seeds of their own.
        DataError: an observation is not finite, or the agent's actions are not or have the wrong shape.
    """
    mode = envs.metadata.get("autoreset_mode")
    if mode != AutoresetMode.DISABLED:
        raise ConfigError(
            f"the vector environment's autoreset_mode is {mode}; expected {AutoresetMode.DISABLED} "
            "(make_envs sets it): only then can every episode start from its own seed"
        )
    low, _ = action_bounds(envs)
    shape = (envs.num_envs, len(low))
    queue = iter(seeds)
    rows: list[_Row | None] = [_next_row(queue) for _ in range(envs.num_envs)]
    seeds_of_rows: Any = [row.seed if row else 0 for row in rows]  # gymnasium's annotation admits one seed only
    observations, _ = envs.reset(seed=seeds_of_rows)
    agent.reset(np.arange(envs.num_envs))
    rewards = np.zeros(envs.num_envs)
    while any(rows):
        _refuse_unfinite(rows, observations)
        actions = agent.act(observations, rewards)
        if actions.shape != shape or not np.isfinite(actions).all():
            name = type(agent).__name__
            raise DataError(f"{name}.act gave an array {actions.shape}; expected finite actions {shape}")
        for row, observation, action in zip(rows, observations, actions, strict=True):
            if row:
                row.observations.append(np.array(observation, np.float32))
                row.actions.append(np.array(action, np.float32))
        observations, rewards, terminated, truncated, _ = envs.step(actions)
        for row, reward in zip(rows, rewards, strict=True):
            if row:
                row.rewards.append(float(reward))
        done = terminated | truncated
        if not done.any():
            continue
        for index in np.flatnonzero(done):
            if row := rows[index]:
                yield row.episode(bool(terminated[index]), bool(truncated[index]))
            rows[index] = _next_row(queue)
        if any(rows):
            reset_seeds: Any = [row.seed if row else 0 for row in rows]  # read only where the mask says so
            observations, _ = envs.reset(seed=reset_seeds, options={"reset_mask": done})
            agent.reset(np.flatnonzero(done))
            rewards = np.where(done, 0.0, rewards)


class _Row:
    """The episode under way in one environment."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.observations: list[NDArray[np.float32]] = []
        self.actions: list[NDArray[np.float32]] = []
        self.rewards: list[float] = []

    def episode(self, terminated: bool, truncated: bool) -> Episode:
        return Episode(
            self.seed,
            np.stack(self.observations),
            np.stack(self.actions),
            np.array(self.rewards, np.float64),
            terminated,
            truncated,
        )


def _next_row(queue: Iterator[int]) -> _Row | None:
    seed = next(queue, None)
    return None if seed is None else _Row(seed)


def action_bounds(envs: VectorEnv) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """The least and the greatest values [A] of an action.

    Raises:
        ConfigError: actions are no vectors of numbers.
    """
    space = envs.single_action_space
    if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
        raise ConfigError(f"the action space is {space}; expected a one-dimensional Box")
    return space.low, space.high


def _refuse_unfinite(rows: list[_Row | None], observations: NDArray[np.floating]) -> None:
    """Raise DataError if an episode shows a value that is not finite."""
    if np.isfinite(observations).all():
        return
    for row, observation in zip(rows, observations, strict=True):
        if row and not np.isfinite(observation).all():
            raise DataError(
                f"the environment's observation {len(row.rewards)} of the episode of seed {row.seed} holds values that "
                "are NaN or infinite"
            )
