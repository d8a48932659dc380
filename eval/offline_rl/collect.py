"""Collect a behaviour policy's episodes into a Minari data set, with Minari's own `DataCollector`.

Shapes: E environments (rows), O observation width, A action width.
"""

from __future__ import annotations

import json
import math
import warnings
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from namm_transfer.configs.settings import check_at_least_one
from namm_transfer.errors import ConfigError, DataError
from namm_transfer.eval.claim import as_stored, differing
from namm_transfer.eval.offline_rl.behaviour import environment_of, load_behaviour
from namm_transfer.eval.offline_rl.minari_data import MINARI, import_minari, open_minari
from namm_transfer.eval.offline_rl.rollout import make_envs
from namm_transfer.eval.provenance import digest

if TYPE_CHECKING:
    from sbx import TQC

SEEDS = 1_000_000
"""Of the environment, for each noise level."""
MEASURED_SEEDS = 20_000_000
"""No episode that is learned from has seeds from here on: measurements made in training begin here."""
RECORD = "namm_transfer"
"""Key of a data set's metadata that says what it was collected with."""


@dataclass(frozen=True)
class CollectionConfig:
    """What to collect: whole episodes until they hold `timesteps` timesteps, at each noise level if any are given.

    Without noise levels the actions are drawn from the policy's own distribution. A noise level is the standard
    deviation of Gaussian noise added to each deterministic action (they lie in [-1, 1]); noise spreads the returns and
    shows how to recover from states that the policy itself never visits. `dataset` is the data set's id; Minari keeps
    it in its own folder (MINARI_DATASETS_PATH). `env_id` is by default what the policy was trained in, as its folder
    tells. Episodes have seeds of the environment of their own, a million for each noise level, from `seed` on.
    """

    policy: Path
    dataset: str
    env_id: str | None = None
    timesteps: int = 200_000
    noise_levels: tuple[float, ...] = ()
    seed: int = 10_000_000

    def __post_init__(self) -> None:
        levels = self.noise_levels
        if not all(math.isfinite(x) and x >= 0 for x in levels) or len(set(levels)) < len(levels):
            raise ConfigError(f"noise_levels is {levels}; expected distinct values >= 0, or none")
        check_at_least_one(self, "timesteps")
        last = MEASURED_SEEDS - SEEDS * max(len(levels), 1)
        if not 0 <= self.seed <= last:
            raise ConfigError(
                f"seed is {self.seed} with {len(levels)} noise levels; expected "
                + (f"0 to {last}" if last >= 0 else f"{MEASURED_SEEDS // SEEDS} levels at most")
                + f": each level has {SEEDS} seeds, and those from {MEASURED_SEEDS} on belong to measurements"
            )


class BehaviourAgent:
    """An `Agent` (see `rollout`) that acts as a behaviour policy does.

    Args:
        policy: the policy.
        noise: standard deviation of what is added to its deterministic actions; None: actions are drawn from its
            distribution.
        generator: of the noise.
    """

    def __init__(self, policy: TQC, noise: float | None, generator: np.random.Generator) -> None:
        self.policy, self.noise, self.generator = policy, noise, generator

    def reset(self, rows: NDArray[np.intp]) -> None:
        """Nothing to forget: the policy is memoryless."""

    def act(self, observations: NDArray[np.floating], rewards: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return actions [E, A] for observations [E, O]."""
        actions, _ = self.policy.predict(observations.astype(np.float32), deterministic=self.noise is not None)
        noise = self.noise * self.generator.standard_normal(actions.shape) if self.noise else 0.0
        return np.clip(actions + noise, -1.0, 1.0).astype(np.float32)


def collect_episodes(config: CollectionConfig, *, progress: bool = True) -> str:
    """Collect a data set, whole or not at all, and return it as a source of episodes: `minari:ID`.

    One that is there already is left as it is.

    Raises:
        CheckpointError: there is no behaviour policy.
        ConfigError: minari is not installed; gymnasium does not know the environment, it is not the policy's, or none
            is given and the policy's folder tells none; or there is a data set of this id that was collected with other
            settings, or by others.
        DataError: the id is none.
    """
    minari = import_minari()
    policy = load_behaviour(config.policy)
    env_id = _environment(config)
    settings = as_stored(asdict(config) | {"env_id": env_id, "policy": digest(config.policy)})
    if _is_there(config.dataset):
        found = open_minari(config.dataset).storage.metadata.get(RECORD)
        if not isinstance(found, str):
            raise ConfigError(
                f"the Minari data set {config.dataset!r} is there, collected by others or cut off while it was "
                "written; give another id (dataset=ID), or delete it (minari delete ID)"
            )
        stored = json.loads(found)
        if stored != settings:
            changed = ", ".join(differing(stored, settings))
            raise ConfigError(
                f"the Minari data set {config.dataset!r} is there, with other values of {changed}; give "
                "another id (dataset=ID), or delete it (minari delete ID)"
            )
        return f"{MINARI}{config.dataset}"
    env = gymnasium.make(env_id, disable_env_checker=True)
    with closing(minari.DataCollector(env)) as collector, Progress(disable=not progress) as bar:
        levels = config.noise_levels or (None,)
        task = bar.add_task(f"episodes of {config.dataset}", total=len(levels) * config.timesteps)
        for index, level in enumerate(levels):
            agent = BehaviourAgent(policy, level, np.random.default_rng([config.seed, index]))
            timesteps = 0
            for seed in count(config.seed + index * SEEDS):
                length = _play(collector, agent, seed)
                timesteps += length
                bar.update(task, advance=length)
                if timesteps >= config.timesteps:
                    break
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*`(code_permalink|author|author_email|eval_env)` is set to None")
            dataset = collector.create_dataset(
                config.dataset,
                algorithm_name="TQC",
                description=f"{env_id}: a behaviour policy's episodes, collected by namm-transfer",
            )
        dataset.storage.update_metadata({RECORD: json.dumps(settings)})
    return f"{MINARI}{config.dataset}"


def _environment(config: CollectionConfig) -> str:
    """Where the policy plays: what it was trained in, as far as its folder tells."""
    folder = config.policy.parent
    trained = environment_of(folder) if (folder / "config.json").is_file() else None
    env_id = config.env_id or trained
    if env_id is None:
        raise ConfigError(
            f"env_id has no value, and {folder} has no config.json of `train behaviour` that tells what "
            f"{config.policy.name} was trained in: give env_id=..."
        )
    make_envs(env_id, 1).close()  # says what is wrong with the environment, if anything is
    if trained not in (None, env_id):
        raise ConfigError(f"env_id is {env_id}, but {config.policy} was trained in {trained}")
    return env_id


def _is_there(dataset: str) -> bool:
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.storage.datasets_root_dir import get_dataset_path

    try:
        parse_dataset_id(dataset)
    except ValueError as error:
        raise DataError(f"{dataset!r} is no id of a Minari data set, such as hopper/expert-v0: {error}") from error
    return bool(get_dataset_path(dataset).exists())


def _play(collector: Any, agent: BehaviourAgent, seed: int) -> int:
    """Play an episode; returns its timesteps."""
    observation, _ = collector.reset(seed=seed)
    length, done = 0, False
    while not done:
        observation, _, terminated, truncated, _ = collector.step(agent.act(observation[None], np.zeros(1))[0])
        length, done = length + 1, terminated or truncated
    return length
