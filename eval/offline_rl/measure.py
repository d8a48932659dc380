"""Measure an agent's return over seeded episodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.progress import Progress

from namm_transfer.eval.offline_rl.behaviour import load_behaviour
from namm_transfer.eval.offline_rl.collect import BehaviourAgent
from namm_transfer.eval.offline_rl.host import load_host
from namm_transfer.eval.offline_rl.rollout import Agent, EpisodeRecord, RandomAgent, make_envs, rollout
from namm_transfer.eval.offline_rl.scores import ReturnSummary, summarise_returns
from namm_transfer.eval.offline_rl.window import WindowAgent


def measure_agent(
    agent: Agent, env_id: str, seeds: Sequence[int], num_envs: int, *, progress: bool = True
) -> list[EpisodeRecord]:
    """Play one episode a seed, with an agent of `num_envs` rows, and return the records in seed order."""
    envs = make_envs(env_id, num_envs)
    with Progress(disable=not progress) as bar:
        task = bar.add_task(f"{type(agent).__name__} on {env_id}", total=len(seeds))
        records = []
        for record in rollout(agent, envs, seeds):
            records.append(record)
            bar.update(task, advance=1)
    envs.close()
    return sorted(records, key=lambda record: record.seed)


def measure_policy(
    policy: Path | None, env_id: str, seeds: Sequence[int], num_envs: int, *, progress: bool = True
) -> ReturnSummary:
    """Return the returns of a behaviour policy without noise; without one, of the uniform random policy."""
    generator = np.random.default_rng(seeds[0])
    agent: Agent
    if policy is None:
        envs = make_envs(env_id, 1)
        agent = RandomAgent(envs, generator)
        envs.close()
    else:
        agent = BehaviourAgent(load_behaviour(policy), 0.0, generator)
    records = measure_agent(agent, env_id, seeds, num_envs, progress=progress)
    return summarise_returns(record.return_raw for record in records)


def measure_host(
    host: Path | None,
    seeds: range,
    num_envs: int,
    *,
    window: int | None = None,
    target_return: float | None = None,
    progress: bool = True,
) -> ReturnSummary:
    """Measure a host, as stored, under the window agent; by default its own window and target return."""
    model, normalisation = load_host(host)
    agent = WindowAgent(model, normalisation, num_envs, window=window, target_return=target_return)
    records = measure_agent(agent, normalisation.env_id, seeds, num_envs, progress=progress)
    return summarise_returns(record.return_raw for record in records)
