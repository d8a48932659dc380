"""Collect a behaviour policy's episodes at several noise levels.

Shapes: E environments (rows), O observation width, A action width.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from namm_transfer.errors import ConfigError
from namm_transfer.eval.offline_rl.behaviour import load_behaviour
from namm_transfer.eval.offline_rl.claim import claim
from namm_transfer.eval.offline_rl.episodes import Episode, save_episodes
from namm_transfer.eval.offline_rl.rollout import make_envs, play
from namm_transfer.eval.provenance import digest

if TYPE_CHECKING:
    from sbx import TQC

RECORD = "collection.json"


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
        if not levels or not all(math.isfinite(x) and x >= 0 for x in levels) or len(set(levels)) < len(levels):
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


def episodes_file(level: float) -> str:
    """Name of the file of a noise level: two decimals, or as many as it takes to tell it from any other level."""
    short = f"{level:.2f}"
    return f"noise-{short if float(short) == level else repr(float(level))}.npz"


def collect_episodes(config: CollectionConfig, *, progress: bool = True) -> list[Path]:
    """Collect one file of episodes a noise level; levels whose file exists are kept, so a run resumes.

    What they were collected with is in `collection.json` beside them.

    Raises:
        CheckpointError: there is no behaviour policy.
        ConfigError: the folder holds episodes of another configuration, or of an unknown one.
    """
    paths = [config.output / episodes_file(level) for level in config.noise_levels]
    policy = load_behaviour(config.policy)
    record = config.output / RECORD
    if not record.exists() and (found := sorted(path.name for path in config.output.glob("noise-*.npz"))):
        raise ConfigError(
            f"{config.output} holds {', '.join(found)}, but no {RECORD} that says of what; use a new folder"
        )
    settings = asdict(config) | {"policy": digest(config.policy)}
    claim(record, {key: value for key, value in settings.items() if key != "output"})
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
