"""A robot drawn from where its bodies are, in the plane of x and z: no renderer of MuJoCo's, and no display, is needed.

Shape letters: T timesteps, G bodies (geoms of MuJoCo), H, W pixels.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import Any

import gymnasium
import mujoco
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from namm_transfer.errors import DataError

__all__ = ["Robot", "robot_of"]

_SKY, _GROUND, _MARK, _BODY = (236, 240, 244), (150, 142, 130), (112, 104, 94), (58, 84, 120)
_FEET = (196, 98, 60)
_METRES = 2.4
"""Height of the picture."""
_BELOW = 0.25
"""How far it reaches below the ground."""
_FINER = 2
"""Drawn so many times larger, then scaled down: smooth edges."""


@dataclass(frozen=True)
class Robot:
    """The bodies of a robot that do not change: capsules, of which a sphere is one without length.

    Attributes:
        numbers: those of its bodies among all G.
        radii, halves: radius and half the length of each, in metres.
        feet: those that are drawn in another colour.
        dt: seconds of a timestep.
    """

    numbers: tuple[int, ...]
    radii: tuple[float, ...]
    halves: tuple[float, ...]
    feet: frozenset[int]
    dt: float

    def draw(self, bodies: NDArray[np.floating], height: int, width: int) -> NDArray[np.uint8]:
        """A picture uint8 [H, W, 3] that follows the robot.

        Args:
            bodies: [G, 4] x and z of the middles and of the axes, at one timestep.
            height, width: H, W.
        """
        size, scale = (width * _FINER, height * _FINER), height * _FINER / _METRES
        image = Image.new("RGB", size, _SKY)
        pen = ImageDraw.Draw(image)
        centre = float(bodies[self.numbers[0], 0])

        def place(x: float, z: float) -> tuple[float, float]:
            return size[0] / 2 + (x - centre) * scale, size[1] - (z + _BELOW) * scale

        pen.rectangle((0, place(0, 0)[1], *size), fill=_GROUND)
        half = size[0] / 2 / scale
        for metre in range(int(np.floor(centre - half)), int(np.ceil(centre + half)) + 1):
            x, z = place(metre, 0)
            pen.line((x, z, x, z + 0.12 * scale), fill=_MARK, width=2 * _FINER)
        for number, radius, reach in zip(self.numbers, self.radii, self.halves, strict=True):
            x, z, along, up = map(float, bodies[number])
            ends = [place(x + side * reach * along, z + side * reach * up) for side in (-1, 1)]
            colour, r = _FEET if number in self.feet else _BODY, radius * scale
            pen.line([*ends[0], *ends[1]], fill=colour, width=max(1, round(2 * r)))
            for a, b in ends:
                pen.ellipse((a - r, b - r, a + r, b + r), fill=colour)
        return np.asarray(image.resize((width, height), Image.Resampling.BOX))


def robot_of(env_id: str) -> Robot:
    """The robot of one of gymnasium's MuJoCo environments.

    Raises:
        DataError: it has none, or bodies that are neither capsules nor spheres.
    """
    with closing(gymnasium.make(env_id, disable_env_checker=True)) as env:
        model: Any = getattr(env.unwrapped, "model", None)
        if not isinstance(model, mujoco.MjModel):
            raise DataError(f"{env_id} is no environment of MuJoCo: there is no robot to draw")
        kinds = [mujoco.mjtGeom(kind) for kind in model.geom_type.tolist()]
        plane, capsule, sphere = (getattr(mujoco.mjtGeom, f"mjGEOM_{name}") for name in ("PLANE", "CAPSULE", "SPHERE"))
        numbers = [i for i, kind in enumerate(kinds) if kind != plane]
        if not numbers or any(kinds[i] not in (capsule, sphere) for i in numbers):
            raise DataError(f"{env_id}: expected a robot of capsules and spheres to draw")
        halves = [float(model.geom_size[i, 1]) if kinds[i] == capsule else 0.0 for i in numbers]
        return Robot(
            tuple(numbers),
            tuple(float(model.geom_size[i, 0]) for i in numbers),
            tuple(halves),
            frozenset(i for i in numbers if "foot" in model.geom(i).name),
            float(env.unwrapped.dt),  # type: ignore[attr-defined]
        )
