"""Agents with a memory: one that plays, and one that notes what its memory holds.

Shape letters: E environments (rows), O observation width, A action width, L layers, K KV heads, S tokens seen,
T timesteps, G geometric bodies of a robot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium.vector import SyncVectorEnv
from numpy.typing import NDArray

from namm_transfer.adapters.decision_transformer import DecisionTransformerHost
from namm_transfer.eval.offline_rl.episodes import Episode
from namm_transfer.eval.task import kept_at_updates

__all__ = ["KINDS", "MemoryAgent", "WatchedAgent", "WatchedEpisode"]

KINDS = ("return", "state", "action")
"""The tokens of a timestep t in their order: at the positions 3t, 3t + 1 and 3t + 2 of an episode."""


class MemoryAgent:
    """An `Agent` (see `rollout`) with a memory: each timestep is computed once, nothing is computed again.

    Args:
        host: under a policy.
        num_envs: E.
        once: each row plays one episode. What it does behind the end is dropped, so it is not begun anew: rows that
            began together stay in step, and rows in step are computed together.
    """

    def __init__(self, host: DecisionTransformerHost, num_envs: int, *, once: bool = False) -> None:
        self.host, self.num_envs, self.once = host, num_envs, once
        host.reset(num_envs)

    def reset(self, rows: NDArray[np.intp]) -> None:
        """Forget the episodes of `rows`."""
        if not self.once:
            self.host.reset_rows(rows)

    def act(self, observations: NDArray[np.floating], rewards: NDArray[np.floating]) -> NDArray[np.float32]:
        """Actions [E, A] for observations [E, O] and the rewards [E] of the previous actions."""
        actions: NDArray[np.float32] = self.host.act(observations, rewards)
        return actions

    def measured(self, row: int) -> dict[str, Any]:
        """What the memory holds of a row's first episode, as fields of an outcome; asked before it is forgotten."""
        whole = self.host.stats()
        return {
            "kept_fraction": whole.kept_fraction_by_row[row],
            "kept_at_updates": kept_at_updates(whole.kept_by_row[row], self.host.policy),
            "tokens_seen": whole.seen[row],
            # Rows are allocated together, each as wide as the fullest.
            "bytes_kv": whole.bytes["kv"] // self.num_envs,
            "bytes_total": whole.bytes["total"] // self.num_envs,
        }


@dataclass(frozen=True)
class WatchedEpisode:
    """An episode, and what the memory held of it.

    Attributes:
        episode: as it was played.
        interval: tokens between two decisions.
        decisions: after each decision, which of the S = interval, 2 · interval, … tokens seen were retained: bool
            [L, K, S].
        shape: (L, K).
        bodies: where the robot's bodies were at each timestep [T, G, 4]: x and z of the middle, x and z of the axis;
            empty unless asked for.
    """

    episode: Episode
    interval: int
    decisions: tuple[NDArray[np.bool_], ...]
    shape: tuple[int, int]
    bodies: NDArray[np.float32]

    @property
    def kept_at_updates(self) -> float | None:
        """As of a result row: retained / seen just after each decision, averaged over decisions; None without one."""
        return float(np.mean([kept.mean() for kept in self.decisions])) if self.decisions else None

    def retained(self, timestep: int) -> NDArray[np.bool_]:
        """Which tokens are retained once timestep t was acted in: bool [L, K, t + 1, 3], kinds in the order of
        `KINDS`. Its own action comes into the memory with the next timestep, and counts as retained."""
        out = np.ones((*self.shape, timestep + 1, len(KINDS)), np.bool_)
        seen = out.shape[2] * out.shape[3] - 1
        if done := min(seen // self.interval, len(self.decisions)):
            last = self.decisions[done - 1]
            out.reshape(*self.shape, -1)[..., : last.shape[-1]] = last
        return out


class WatchedAgent(MemoryAgent):
    """A `MemoryAgent` that notes each decision of its rows' first episodes, and on demand where their bodies are.

    Args:
        host, num_envs: as of a `MemoryAgent`.
        envs: where the rows play, to note their bodies; None: these are not noted.
    """

    def __init__(self, host: DecisionTransformerHost, num_envs: int, envs: SyncVectorEnv | None = None) -> None:
        super().__init__(host, num_envs, once=True)
        self.envs = envs
        self.decisions: list[list[NDArray[np.bool_]]] = [[] for _ in range(num_envs)]
        self.bodies: list[list[NDArray[np.float32]]] = [[] for _ in range(num_envs)]
        self._over: set[int] | None = None

    def reset(self, rows: NDArray[np.intp]) -> None:
        """Forget the episodes of `rows`; what follows in them is not watched."""
        super().reset(rows)
        self._over = set() if self._over is None else self._over | set(rows.tolist())

    def act(self, observations: NDArray[np.floating], rewards: NDArray[np.floating]) -> NDArray[np.float32]:
        """Act as a `MemoryAgent`, and take note."""
        watched = [row for row in range(self.num_envs) if row not in (self._over or ())]
        if self.envs is not None:
            for row in watched:
                self.bodies[row].append(_bodies(self.envs.envs[row]))
        actions = super().act(observations, rewards)
        for row in watched:
            decided = len(self.decisions[row]) + 1
            seen = decided * self.host.update_interval
            if self.host.policy.evicts and self._layers[0].seen[row] >= seen:
                self.decisions[row].append(self._retained(row, seen))
        return actions

    def watched(self, row: int, episode: Episode) -> WatchedEpisode:
        """What was noted of a row's first episode; asked before it is forgotten."""
        heads = self._layers[0].tokens.lengths.shape[1]
        bodies = np.stack(self.bodies[row]) if self.bodies[row] else np.zeros((0, 0, 4), np.float32)
        shape = (len(self._layers), heads)
        return WatchedEpisode(episode, self.host.update_interval, tuple(self.decisions[row]), shape, bodies)

    @property
    def _layers(self) -> list[Any]:
        return [] if self.host.cache is None else list(self.host.cache.layers)

    def _retained(self, row: int, seen: int) -> NDArray[np.bool_]:
        """Which of a row's first S tokens are retained, [L, K, S]."""
        layers = self._layers
        out = np.zeros((len(layers), layers[0].tokens.lengths.shape[1], seen), np.bool_)
        for layer, of_layer in zip(layers, out, strict=True):
            lengths = layer.tokens.lengths[row].tolist()
            positions = layer.tokens["positions"][row].cpu().numpy()  # [K, N]
            for length, held, kept in zip(lengths, positions, of_layer, strict=True):
                kept[held[:length][held[:length] < seen]] = True
        return out


def _bodies(env: Any) -> NDArray[np.float32]:
    """Middles and axes of a MuJoCo environment's bodies, in the plane of x and z: [G, 4]."""
    data = env.unwrapped.data
    return np.concatenate([data.geom_xpos[:, [0, 2]], data.geom_xmat[:, [2, 8]]], axis=1).astype(np.float32)
