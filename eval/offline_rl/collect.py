"""Collect a behaviour policy's episodes at several noise levels.

Shapes: E environments (rows), O observation width, A action width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from namm_transfer.errors import ConfigError
from namm_transfer.eval.offline_rl.behaviour import load_behaviour
from namm_transfer.eval.offline_rl.episodes import Episode, save_episodes
from namm_transfer.eval.offline_rl.rollout import make_envs, play

if TYPE_CHECKING:
    from sbx import TQC


@dataclass(frozen=True)
class CollectionConfig:
    """What to collect: at each noise level, whole episodes until they hold `timesteps_per_level` timesteps.

    A noise level is the standard deviation of Gaussian noise added to each action (Hopper's lie in [-1, 1]).
    Noise spreads the returns and shows how to recover from states that the policy itself never visits.
    """

    policy: Path
    output: Path
    env_id: str = "Hopper-v5"
    noise_levels: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3)
    timesteps_per_level: int = 100_000
    num_envs: int = 32
    seed: int = 10_000_000

    def __post_init__(self) -> None:
        levels = self.noise_levels
        if not levels or min(levels) < 0 or len(set(levels)) < len(levels):
            raise ConfigError(f"noise_levels is {levels}; expected distinct values >= 0")
        for name in ("timesteps_per_level", "num_envs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"CollectionConfig.{name} is {getattr(self, name)}; expected at least 1")


class NoisyPolicyAgent:
    """The behaviour policy's deterministic action plus Gaussian noise, clipped to [-1, 1]."""

    def __init__(self, policy: TQC, noise: float, generator: np.random.Generator) -> None:
        self.policy, self.noise, self.generator = policy, noise, generator

    def reset(self, rows: NDArray[np.intp]) -> None:
        """Nothing to forget: the policy is memoryless."""

    def act(self, observations: NDArray[np.floating], rewards: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return actions [E, A] for observations [E, O]."""
        actions, _ = self.policy.predict(observations.astype(np.float32), deterministic=True)
        noise = self.noise * self.generator.standard_normal(actions.shape)
        return np.clip(actions + noise, -1.0, 1.0).astype(np.float32)


def collect_episodes(config: CollectionConfig, *, progress: bool = True) -> list[Path]:
    """Collect one file of episodes a noise level; levels whose file exists are kept, so a run resumes."""
    paths = [config.output / f"noise-{level:.2f}.npz" for level in config.noise_levels]
    policy = load_behaviour(config.policy)
    with Progress(disable=not progress) as bar:
        task = bar.add_task("episodes", total=len(paths) * config.timesteps_per_level)
        for index, (level, path) in enumerate(zip(config.noise_levels, paths, strict=True)):
            if not path.exists():
                agent = NoisyPolicyAgent(policy, level, np.random.default_rng([config.seed, index]))
                envs = make_envs(config.env_id, config.num_envs)
                kept: list[Episode] = []
                timesteps = 0
                for episode in play(agent, envs, count(config.seed + index * 1_000_000)):
                    kept.append(episode)
                    timesteps += episode.length
                    bar.update(task, advance=episode.length)
                    if timesteps >= config.timesteps_per_level:
                        break
                envs.close()
                save_episodes(path, kept)
            bar.update(task, completed=(index + 1) * config.timesteps_per_level)
    return paths
