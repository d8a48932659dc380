"""Train the behaviour policy whose episodes a decision transformer learns from (TQC, library: sbx)."""

from __future__ import annotations

import json
import math
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from namm_transfer.configs.settings import check_at_least_one
from namm_transfer.errors import CheckpointError, ConfigError, DataError
from namm_transfer.eval.claim import claim
from namm_transfer.eval.offline_rl.episodes import Episode, save_episodes
from namm_transfer.eval.offline_rl.rollout import action_bounds, make_envs
from namm_transfer.files import append_json, replacing, whole_lines

if TYPE_CHECKING:
    from sbx import TQC

TRAIN_EVERY = 8
"""Timesteps between two updates, as many gradient steps at each: timesteps are collected by so many."""


@dataclass(frozen=True)
class BehaviourConfig:
    """What to train.

    `evaluate_every` and `timesteps` are environment steps. Training stops at `timesteps`, or, if there is a
    `stop_return`, at the first evaluation (deterministic actions) whose mean `return_raw` reaches it. At the first one
    that reaches `medium_return`, the policy is kept as `medium.zip`, and every episode it was trained on as
    `medium-replay.npz`: D4RL's "medium" and "medium-replay" (Fu et al., 2020).
    """

    output: Path
    env_id: str = "Hopper-v5"
    timesteps: int = 300_000
    evaluate_every: int = 10_000
    evaluation_episodes: int = 10
    stop_return: float | None = None
    medium_return: float | None = None
    learning_starts: int = 5_000
    top_quantiles_to_drop_per_net: int = 5  # TQC's published setting for Hopper
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least_one(self, "timesteps", "evaluate_every", "evaluation_episodes")


def train_behaviour(config: BehaviourConfig, *, progress: bool = True) -> Path:
    """Train, or go on training, and return the path of the best policy (`policy.zip`). Needs sbx-rl.

    The output folder holds `policy.zip` (best evaluation so far), `latest.zip` and `replay.pkl` (to resume),
    `progress.jsonl` (one evaluation a line: `timesteps`, `return_raw_mean`, `return_raw_std`, `n`), and what
    `medium_return` asks for.

    Raises:
        ConfigError: gymnasium does not know the environment, its actions are no vectors, or the folder holds a run of
            another configuration, or one that was begun for fewer timesteps.
    """
    with closing(make_envs(config.env_id, 1)) as envs:  # what is wrong with it is said before the folder is claimed
        action_bounds(envs)
    free = ("output", "timesteps", "stop_return")  # when to stop may change while a run goes on
    claim(config.output / "config.json", {key: value for key, value in asdict(config).items() if key not in free})
    from sbx import TQC
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    train_env = make_vec_env(config.env_id, n_envs=1, seed=config.seed)
    test_env = make_vec_env(config.env_id, n_envs=config.evaluation_episodes, seed=config.seed + 1_000_000)
    rows = read_progress(config.output)
    best = max((row["return_raw_mean"] for row in rows), default=-float("inf"))
    latest, replay = config.output / "latest.zip", config.output / "replay.pkl"
    medium = config.output / "medium.zip"
    wanted = math.inf if config.stop_return is None else config.stop_return
    collected = math.ceil(config.timesteps / TRAIN_EVERY) * TRAIN_EVERY
    if latest.exists() and replay.exists():
        model = TQC.load(latest, env=train_env)
        model.load_replay_buffer(replay)
        buffer: Any = model.replay_buffer
        room = buffer.buffer_size
        if collected >= room:
            raise ConfigError(
                f"timesteps is {config.timesteps}, but the run in {config.output} was begun with a replay buffer for "
                f"fewer than {room}: give timesteps below that, or another output"
            )
    else:
        model = TQC(
            "MlpPolicy",
            train_env,
            learning_starts=config.learning_starts,
            train_freq=TRAIN_EVERY,
            gradient_steps=TRAIN_EVERY,
            policy_delay=2,
            buffer_size=collected + 1,  # it counts as full once its last place is taken
            top_quantiles_to_drop_per_net=config.top_quantiles_to_drop_per_net,
            seed=config.seed,
        )
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("behaviour policy", total=config.timesteps, completed=model.num_timesteps)
        while model.num_timesteps < config.timesteps and best < wanted:
            model.learn(min(config.evaluate_every, config.timesteps - model.num_timesteps), reset_num_timesteps=False)
            measured: Any = evaluate_policy(model, test_env, n_eval_episodes=config.evaluation_episodes)
            mean, std = measured
            if mean > best:
                best = float(mean)
                with replacing(config.output / "policy.zip") as partial:
                    model.save(partial)
            if config.medium_return is not None and mean >= config.medium_return and not medium.exists():
                save_episodes(config.output / "medium-replay.npz", replayed(model.replay_buffer))
                with replacing(medium) as partial:
                    model.save(partial)
            row = {
                "timesteps": model.num_timesteps,
                "return_raw_mean": float(mean),
                "return_raw_std": float(std),
                "n": config.evaluation_episodes,
            }
            with replacing(latest) as partial:
                model.save(partial)
            with replacing(replay) as partial:
                model.save_replay_buffer(partial)
            append_json(config.output / "progress.jsonl", row)
            bar.update(
                task,
                completed=model.num_timesteps,
                description=f"behaviour policy, return_raw {mean:.0f}, best {best:.0f}",
            )
    if progress:
        why = "as many as asked for" if best < wanted else f"the best return reached stop_return, {wanted:.0f}"
        bar.console.print(f"stopped at {model.num_timesteps} timesteps: {why}")
    return config.output / "policy.zip"


def replayed(buffer: Any) -> list[Episode]:
    """The whole episodes of a replay buffer (stable-baselines3's, of one environment), oldest first.

    An episode's `seed` is its number. One that was cut off when the run was interrupted is left out: the timestep that
    follows it in the buffer does not begin where it ended.

    Raises:
        DataError: the buffer was full and has lost its oldest timesteps, is of several environments, or holds no whole
            episode.
    """
    if buffer.full or buffer.n_envs != 1:
        raise DataError(
            f"a replay buffer of {buffer.n_envs} environments{', which is full' * buffer.full}: its episodes are not "
            "whole; expected one environment and room for every timestep"
        )
    done = buffer.dones[: buffer.pos, 0].astype(bool)
    leapt = (buffer.next_observations[: max(buffer.pos - 1, 0), 0] != buffer.observations[1 : buffer.pos, 0]).any(-1)
    ends = np.flatnonzero(done | np.append(leapt, False)) + 1
    starts = np.concatenate([[0], ends[:-1]])
    starts, ends = starts[done[ends - 1]], ends[done[ends - 1]]
    if not len(ends):
        raise DataError(f"a replay buffer of {buffer.pos} timesteps holds no whole episode")
    return [
        Episode(
            number,
            buffer.observations[start:end, 0].astype(np.float32),
            buffer.actions[start:end, 0].astype(np.float32),
            buffer.rewards[start:end, 0].astype(np.float64),
            terminated=not buffer.timeouts[end - 1, 0],
            truncated=bool(buffer.timeouts[end - 1, 0]),
        )
        for number, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]


def load_behaviour(path: Path) -> TQC:
    """Load a trained behaviour policy.

    Raises:
        CheckpointError: no file at `path`.
    """
    if not path.is_file():
        raise CheckpointError(f"no behaviour policy at {path}; expected the policy.zip of train_behaviour")
    from sbx import TQC

    return TQC.load(path)


def environment_of(folder: Path) -> str:
    """The environment that the run in a folder was trained in.

    Raises:
        DataError: the folder holds no run of `train_behaviour`.
    """
    try:
        return str(json.loads((folder / "config.json").read_text())["env_id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} holds no run of `train behaviour`: config.json: {error!r}") from error


def read_progress(folder: Path) -> list[dict[str, float]]:
    """Return the evaluations logged so far, oldest first."""
    path = folder / "progress.jsonl"
    return [json.loads(line) for line in whole_lines(path)] if path.exists() else []
