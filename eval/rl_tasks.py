"""The offline-RL task: episodes that a decision transformer plays in MuJoCo.

Shape letters: E environments (rows).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from namm_transfer.adapters import adapt
from namm_transfer.adapters.decision_transformer import DecisionTransformerHost
from namm_transfer.eval.offline_rl.host import PACKAGED_HOST, Normalisation, load_host
from namm_transfer.eval.offline_rl.rollout import make_envs, rollout
from namm_transfer.eval.offline_rl.window import WindowAgent
from namm_transfer.eval.provenance import digest
from namm_transfer.eval.task import Outcome, Unit, check_settings, host_folder, kept_at_updates
from namm_transfer.policies import Policy

__all__ = ["Episodes", "MemoryAgent"]

FIRST_SEED = 40_000_000
"""No episode of the training data or of the measurements made in training has these seeds."""
SEEDS = 10_000


class MemoryAgent:
    """An `Agent` (see `rollout`) with a memory: each timestep is computed once, nothing is computed again."""

    def __init__(self, host: DecisionTransformerHost, normalisation: Normalisation, num_envs: int) -> None:
        self.host, self.num_envs = host, num_envs
        device = host.model.device
        self.mean = torch.tensor(normalisation.state_mean, device=device)
        self.std = torch.tensor(normalisation.state_std, device=device)
        self.return_scale = normalisation.return_scale
        self.target = normalisation.target_return / normalisation.return_scale
        self.to_go = torch.full((num_envs,), self.target, device=device)
        self._measured: dict[int, dict[str, Any]] = {}

    def reset(self, rows: NDArray[np.intp]) -> None:
        """Forget the episodes of `rows`."""
        if self.host.cache is None:
            self.host.reset(self.num_envs)
            return
        for row in rows.tolist():
            self.first_episode(row)
        index = torch.as_tensor(rows, device=self.to_go.device)
        self.host.reset_rows(index)
        self.to_go[index] = self.target

    def act(self, observations: NDArray[np.floating], rewards: NDArray[np.floating]) -> NDArray[np.float32]:
        """Actions [E, A] for observations [E, O] and the rewards [E] of the previous actions."""
        device = self.to_go.device
        self.to_go -= torch.as_tensor(rewards, dtype=torch.float32, device=device) / self.return_scale
        states = (torch.as_tensor(observations, dtype=torch.float32, device=device) - self.mean) / self.std
        actions: NDArray[np.float32] = self.host.step(states, self.to_go).cpu().numpy()
        return actions

    def first_episode(self, row: int) -> dict[str, Any]:
        """What the memory of a row holds, or held when the row's first episode was forgotten: fields of an outcome."""
        if row not in self._measured:
            whole = self.host.stats()
            self._measured[row] = {
                "kept_fraction": whole.kept_fraction_by_row[row],
                "kept_at_updates": kept_at_updates(whole.kept_by_row[row], self.host.policy),
                "tokens_seen": whole.seen[row],
                # Rows are allocated together, each as wide as the fullest.
                "bytes_kv": whole.bytes["kv"] // self.num_envs,
                "bytes_total": whole.bytes["total"] // self.num_envs,
            }
        return self._measured[row]


@dataclass(frozen=True)
class Episodes:
    """Episodes in the environment that the host was trained for; the same environment seeds under every policy.

    The baseline `window` is the host's wrapper, which recomputes its last K timesteps at every step.
    """

    name: str
    model: Mapping[str, Any]
    episodes: int
    metric: str = "return_raw"
    baselines: tuple[str, ...] = ("window",)

    def __post_init__(self) -> None:
        check_settings(self, PACKAGED_HOST, episodes=SEEDS)

    def units(self, seed: int) -> list[Unit]:
        """`episodes` seeds of the environment, none shared between two values of `seed`."""
        first = FIRST_SEED + seed * SEEDS
        return [Unit(str(number), str(number)) for number in range(first, first + self.episodes)]

    def inputs(self) -> dict[str, str]:
        """Digest of the host."""
        return {"host": digest(self._folder)}

    def evaluate(self, units: Sequence[Unit], policy: Policy | str, seed: int) -> Iterator[Outcome]:
        """All episodes at once, one a row; each as soon as it ends."""
        model, normalisation = self._host
        by_seed = {int(unit.id): (row, unit) for row, unit in enumerate(units)}
        with ExitStack() as stack:
            envs = stack.enter_context(closing(make_envs(normalisation.env_id, len(units))))
            agent: WindowAgent | MemoryAgent
            if isinstance(policy, str):
                agent = WindowAgent(model, normalisation, len(units))
            else:
                host = stack.enter_context(adapt(model, policy, self.model["update_interval"]))
                agent = MemoryAgent(host, normalisation, len(units))
            for record in rollout(agent, envs, by_seed):
                row, unit = by_seed[record.seed]
                ended = {"length": record.length, "terminated": record.terminated, "truncated": record.truncated}
                memory = agent.first_episode(row) if isinstance(agent, MemoryAgent) else {}
                yield Outcome(unit, score=record.return_raw, detail=ended, **memory)

    @property
    def _folder(self) -> Path:
        return host_folder(self.model, PACKAGED_HOST)

    @cached_property
    def _host(self) -> tuple[Any, Any]:
        model, normalisation = load_host(self._folder)
        return model.to(self.model["device"]), normalisation
