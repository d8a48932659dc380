"""Windows of episodes as training batches.

Shapes: B windows, L timesteps of a window, O observation width, A action width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from namm_transfer.errors import DataError
from namm_transfer.eval.offline_rl.episodes import Episode


@dataclass(frozen=True)
class Batch:
    """B windows, padded on the right: states [B, L, O], actions [B, L, A], returns_to_go [B, L, 1],
    timesteps [B, L], mask [B, L] (1 where the window has a timestep)."""

    states: torch.Tensor
    actions: torch.Tensor
    returns_to_go: torch.Tensor
    timesteps: torch.Tensor
    mask: torch.Tensor


class WindowSampler:
    """Draws windows from episodes, longer episodes in proportion more often.

    Args:
        episodes: where to draw from.
        return_scale: returns-to-go are divided by it.
        start_fraction: share of windows that begin at timestep 0, which a memory of the whole episode always
            sees and a uniform draw almost never.

    Raises:
        DataError: there are no episodes.
    """

    def __init__(self, episodes: Sequence[Episode], return_scale: float, start_fraction: float) -> None:
        if not episodes:
            raise DataError("no episodes to train on")
        observations = np.concatenate([e.observations for e in episodes])
        self.mean = observations.mean(0, dtype=np.float64).astype(np.float32)
        self.std = (observations.std(0, dtype=np.float64) + 1e-6).astype(np.float32)
        self.states = (observations - self.mean) / self.std
        self.actions = np.concatenate([e.actions for e in episodes])
        returns_to_go = np.concatenate([e.returns_to_go() for e in episodes]) / return_scale
        self.returns_to_go = returns_to_go.astype(np.float32)
        self.lengths = np.array([e.length for e in episodes])
        self.offsets = np.cumsum(self.lengths) - self.lengths
        self.start_fraction = start_fraction

    def batch(self, windows: int, length: int, generator: np.random.Generator) -> Batch:
        """Draw `windows` windows of up to `length` timesteps."""
        episode = generator.choice(len(self.lengths), windows, p=self.lengths / self.lengths.sum())
        latest = np.maximum(self.lengths[episode] - length, 0)
        start = generator.integers(0, latest + 1)
        start[generator.random(windows) < self.start_fraction] = 0
        timesteps = start[:, None] + np.arange(length)
        mask = timesteps < self.lengths[episode][:, None]
        timesteps = np.where(mask, timesteps, 0)
        rows = self.offsets[episode][:, None] + timesteps

        def tensor(values: NDArray[np.generic]) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(values))

        return Batch(
            tensor(self.states[rows]),
            tensor(self.actions[rows]),
            tensor(self.returns_to_go[rows][..., None]),
            tensor(timesteps),
            tensor(mask.astype(np.int64)),
        )
