"""Where a robot nearly falls: how close its torso is to what ends an episode.

Shape letters: T timesteps, O observation width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from namm_transfer.eval.offline_rl.episodes import Episode

__all__ = ["HEALTHY", "NEAR", "Healthy", "margin", "near_falls"]


@dataclass(frozen=True)
class Healthy:
    """What the torso must keep to: heights in metres, the size of the angle in radians. Observations begin with both.

    `height` is that of the start of an episode.
    """

    lowest: float
    highest: float
    angle: float
    height: float = 1.25


HEALTHY = {"Hopper": Healthy(0.7, math.inf, 0.2), "Walker2d": Healthy(0.8, 2.0, 1.0)}
"""By environment, as gymnasium documents them; HalfCheetah goes on however it lies."""
NEAR = 0.25
"""A margin below this is a near fall."""


def margin(observations: NDArray[np.floating], healthy: Healthy) -> NDArray[np.float64]:
    """How far the torso is from the nearest limit, as a share of how far it is when it stands upright.

    Args:
        observations: [T, O].
        healthy: the limits.

    Returns:
        [T]: 1 upright at the height of the start, 0 at a limit.
    """
    height, angle = observations[:, 0].astype(np.float64), observations[:, 1].astype(np.float64)
    margins = [(height - healthy.lowest) / (healthy.height - healthy.lowest), 1 - np.abs(angle) / healthy.angle]
    if math.isfinite(healthy.highest):
        margins.append((healthy.highest - height) / (healthy.highest - healthy.height))
    return np.min(margins, axis=0)


def near_falls(episode: Episode, env_id: str) -> list[int] | None:
    """The timesteps of an episode at which the robot nearly fell, and did not: the worst one of each stretch below
    `NEAR`; None where the environment ends no episode for a fall."""
    if (healthy := HEALTHY.get(env_id.split("-")[0])) is None:
        return None
    margins = margin(episode.observations, healthy)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], margins < NEAR, [False]])))
    moments = []
    for start, stop in edges.reshape(-1, 2).tolist():
        if not (episode.terminated and stop == episode.length):  # that is the fall itself
            moments.append(start + int(np.argmin(margins[start:stop])))
    return moments
