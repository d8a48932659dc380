"""Measure an agent's return over seeded episodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.progress import Progress

from namm_transfer.eval.offline_rl.behaviour import load_behaviour
from namm_transfer.eval.offline_rl.collect import NoisyPolicyAgent
from namm_transfer.eval.offline_rl.rollout import Agent, EpisodeRecord, RandomAgent, make_envs, rollout
from namm_transfer.eval.offline_rl.scores import ReturnSummary, summarise_returns


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


def measure_references(
    policy: Path, env_id: str, seeds: Sequence[int], num_envs: int, *, progress: bool = True
) -> tuple[ReturnSummary, ReturnSummary]:
    """Return the returns of the uniform random policy and of the behaviour policy without noise."""
    envs = make_envs(env_id, num_envs)
    generator = np.random.default_rng(seeds[0])
    agents: tuple[Agent, ...] = (
        RandomAgent(envs, generator),
        NoisyPolicyAgent(load_behaviour(policy), 0.0, generator),
    )
    envs.close()
    played = (measure_agent(agent, env_id, seeds, num_envs, progress=progress) for agent in agents)
    random, behaviour = (summarise_returns(record.return_raw for record in records) for records in played)
    return random, behaviour
