"""How many steps a second a host takes with a memory, and with the wrapper's window recomputed at every step.

    python -m namm_transfer.eval.offline_rl.speed --out FOLDER

All agents play the packaged host's environment in turns of a few steps, so that whatever else the machine does meets
all of them alike; times are the processor's, of one thread, and ratios are of one turn each. What is compared is an
agent's own time (`act`, and starting episodes); with MuJoCo's is told beside it.
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from namm_transfer import NAMM, policy
from namm_transfer.adapters import adapt
from namm_transfer.cli import plain_errors
from namm_transfer.configs.settings import check_at_least_one
from namm_transfer.eval.offline_rl.agent import MemoryAgent
from namm_transfer.eval.offline_rl.host import load_host
from namm_transfer.eval.offline_rl.rollout import Agent, make_envs
from namm_transfer.eval.offline_rl.window import WindowAgent
from namm_transfer.eval.provenance import hardware, versions
from namm_transfer.files import write_atomically

__all__ = ["SpeedConfig", "measure_speed"]

MEMORIES: dict[str, tuple[dict[str, Any], bool]] = {
    "namm": ({}, False),
    "namm, budget 60": ({"budget": 60}, False),  # the tokens of 20 timesteps
    "namm, budget 60, rows apart": ({"budget": 60}, True),
    "namm, budget 192": ({"budget": 192}, False),  # of 64
    "namm, budget 192, rows apart": ({"budget": 192}, True),
    "h2o, budget 192": ({"budget": 192}, False),
    "h2o, budget 192, rows apart": ({"budget": 192}, True),
    "streaming, budget 192, rows apart": ({"budget": 192}, True),
    "full": ({}, False),
}
"""Cached agents: options of the policy, and whether the rows' episodes begin at different steps, as they come to once
some have ended: then rows no longer share their hops and decisions."""


@dataclass(frozen=True)
class SpeedConfig:
    """What to measure: `turns` turns of `steps` vector steps each, after `warm_up` steps of every agent.

    By default a turn's tokens are those of one `update_interval`, so that each turn holds as many decisions.
    """

    num_envs: int = 8
    windows: tuple[int, ...] = (20, 64)
    update_interval: int = 48
    turns: int = 8
    steps: int = 16
    warm_up: int = 80
    threads: int = 1

    def __post_init__(self) -> None:
        check_at_least_one(self, "num_envs", "turns", "steps", "warm_up", "threads")


class _Player:
    """An agent in environments of its own."""

    def __init__(self, agent: Agent, env_id: str, num_envs: int) -> None:
        self.agent, self.envs, self.seeds = agent, make_envs(env_id, num_envs), count(60_000_000)
        self.acting = self.stepping = 0.0
        seeds: Any = [next(self.seeds) for _ in range(num_envs)]
        self.observations, _ = self.envs.reset(seed=seeds)
        self.rewards = np.zeros(num_envs)
        agent.reset(np.arange(num_envs))

    def part(self, steps: int) -> None:
        """Play on, and begin a new episode in one row after the other, so many steps apart."""
        for row in range(self.envs.num_envs):
            self.play(steps)
            self._begin(np.arange(self.envs.num_envs) == row)

    def play(self, steps: int) -> tuple[float, float]:
        """Seconds of the processor that the agent, and that the environments take for so many steps."""
        acting = stepping = 0.0
        for _ in range(steps):
            begun = time.process_time()
            actions = self.agent.act(self.observations, self.rewards)
            acted = time.process_time()
            self.observations, self.rewards, terminated, truncated, _ = self.envs.step(actions)
            if (done := terminated | truncated).any():
                spent = self._begin(done)
                acting, stepping = acting + spent, stepping - spent
            stepping += time.process_time() - acted
            acting += acted - begun
        return acting, stepping

    def _begin(self, rows: NDArray[np.bool_]) -> float:
        """Begin new episodes; returns the agent's seconds."""
        seeds: Any = [next(self.seeds) if chosen else 0 for chosen in rows]
        self.observations, _ = self.envs.reset(seed=seeds, options={"reset_mask": rows})
        self.rewards = np.where(rows, 0.0, self.rewards)
        before = time.process_time()
        self.agent.reset(np.flatnonzero(rows))
        return time.process_time() - before


def measure_speed(config: SpeedConfig, *, progress: bool = True) -> dict[str, Any]:
    """Measure; milliseconds a vector step and ratios to each window, medians over turns with their quartiles."""
    torch.set_num_threads(config.threads)
    _, normalisation = load_host()
    with ExitStack() as stack:
        players = {}
        for window in config.windows:
            recomputing = WindowAgent(load_host()[0], normalisation, config.num_envs, window=window)
            players[f"window {window}"] = _Player(recomputing, normalisation.env_id, config.num_envs)
        for name, (options, apart) in MEMORIES.items():
            kind = name.split(",")[0]
            given = options | ({"namm": NAMM.from_pretrained("default")} if kind == "namm" else {})
            # each agent has a model of its own: another attention is set on it
            host = adapt(load_host()[0], policy(kind, **given), config.update_interval, normalisation=normalisation)
            agent = MemoryAgent(stack.enter_context(host), config.num_envs)
            players[name] = _Player(agent, normalisation.env_id, config.num_envs)
            if apart:
                players[name].part(5)
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in players}
        bar = stack.enter_context(Progress(disable=not progress))
        task = bar.add_task("speed", total=config.turns + 1)
        for player in players.values():
            player.play(config.warm_up)
        bar.advance(task)
        for _ in range(config.turns):
            for name, player in players.items():
                seconds[name].append(player.play(config.steps))
            bar.advance(task)
        memories = {name: p.agent for name, p in players.items() if isinstance(p.agent, MemoryAgent)}
        kept = {name: memory.host.stats().kept_fraction for name, memory in memories.items()}
        for player in players.values():
            player.envs.close()
    acting = {name: np.array([a for a, _ in turns]) / config.steps for name, turns in seconds.items()}
    stepping = {name: np.array([s for _, s in turns]) / config.steps for name, turns in seconds.items()}
    return {
        "settings": asdict(config),
        "environment": normalisation.env_id,
        "hardware": hardware(),
        "versions": versions(),
        "agents": {
            name: {
                "act_ms": _quartiles(acting[name] * 1e3),
                "environments_ms": _quartiles(stepping[name] * 1e3),
                "steps_per_second": config.num_envs / float(np.median(acting[name])),
                "steps_per_second_with_environments": config.num_envs / float(np.median(acting[name] + stepping[name])),
                "kept_fraction_at_end": kept.get(name),
                "times_faster": {
                    f"window {window}": _quartiles(acting[f"window {window}"] / acting[name])
                    for window in config.windows
                    if not name.startswith("window")
                },
            }
            for name in players
        },
    }


def _quartiles(values: np.ndarray) -> list[float]:
    """Median, lower and upper quartile."""
    return [round(float(value), 4) for value in np.quantile(values, (0.5, 0.25, 0.75))]


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    windows = [f"window {window}" for window in result["settings"]["windows"]]
    heads = ["agent", "ms a vector step", "steps/s", "steps/s with MuJoCo", *(f"against {w}" for w in windows)]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for name, row in result["agents"].items():
        ratios = [_shown(row["times_faster"].get(window), "×") for window in windows]
        cells = [_shown(row["act_ms"]), f"{row['steps_per_second']:,.0f}"]
        cells += [f"{row['steps_per_second_with_environments']:,.0f}", *ratios]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _shown(quartiles: list[float] | None, unit: str = "") -> str:
    if quartiles is None:
        return "–"
    return f"{quartiles[0]:.2f}{unit} [{quartiles[1]:.2f}, {quartiles[2]:.2f}]"


def main(
    out: Annotated[Path, typer.Option(help="Folder for speed.json and table.md.")],
    turns: Annotated[int, typer.Option(help="Of every agent; medians are over them.")] = SpeedConfig.turns,
) -> None:
    """How many steps a second a host takes with a memory, and with its window recomputed at every step."""
    config = SpeedConfig(turns=turns)
    out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written is told before anything is measured
    result = measure_speed(config)
    write_atomically(out / "speed.json", json.dumps(result, indent=2) + "\n")
    write_atomically(out / "table.md", table(result))
    Console().print(table(result))


if __name__ == "__main__":
    with plain_errors():
        typer.run(main)
