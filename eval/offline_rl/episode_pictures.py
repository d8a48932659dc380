"""Pictures of an episode and of what a memory retains of it: a picture, an mp4 and a page.

Shape letters: T timesteps, t of them, L layers, K KV heads, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from namm_transfer.eval.inspect_page import write_page
from namm_transfer.eval.offline_rl.agent import KINDS, WatchedEpisode
from namm_transfer.eval.offline_rl.drawing import Robot
from namm_transfer.eval.video import write_mp4
from namm_transfer.files import replacing

__all__ = ["episode_mp4", "episode_page", "episode_picture"]

_FPS = 30
_HEIGHT, _LEFT, _ROW, _GAP = 320, 112, 12, 8
_LEAST = 640
_DARK, _EVICTED, _LIT = (24, 24, 24), (58, 58, 66), (255, 196, 64)
_SEVERAL = 16
"""Frames that are drawn at a time."""


def strips(watched: WatchedEpisode, timestep: int) -> NDArray[np.float64]:
    """Share of the heads that retain each token at a timestep: [L, 3, T], kinds in the order of `KINDS`; NaN for what
    is still to come."""
    layers, total = watched.shape[0], watched.episode.length
    out = np.full((layers, len(KINDS), total), np.nan)
    out[:, :, : timestep + 1] = watched.retained(timestep).mean(1).transpose(0, 2, 1)
    return out


def episode_mp4(path: Path, watched: WatchedEpisode, robot: Robot) -> None:
    """A video of the robot; under it the tokens of the episode, a row for each layer and kind, lit where retained.

    Args:
        path: of the mp4.
        watched: with bodies.
        robot: whose bodies they are.
    """
    every = max(1, round(1 / robot.dt / _FPS))
    shown = list(range(0, watched.episode.length, every))
    if shown[-1] != watched.episode.length - 1:
        shown.append(watched.episode.length - 1)
    write_mp4(path, _frames(watched, robot, shown), 1 / robot.dt / every, crf=18)


def _frames(watched: WatchedEpisode, robot: Robot, shown: list[int]) -> Iterator[NDArray[np.uint8]]:
    total, layers = watched.episode.length, watched.shape[0]
    wide = max(1, -(-_LEAST // total))  # pixels of a timestep
    width, height = _LEFT + wide * total, _HEIGHT + layers * (_ROW * len(KINDS) + _GAP) + _GAP
    width, height = width + width % 2, height + height % 2
    labels = _labels(layers, width, height)
    earned = np.cumsum(watched.episode.rewards)
    for first in range(0, len(shown), _SEVERAL):
        part = []
        for t in shown[first : first + _SEVERAL]:
            page = labels.copy()
            page[:_HEIGHT] = robot.draw(watched.bodies[t], _HEIGHT, width)
            for layer, of_layer in enumerate(strips(watched, t)):
                for kind, shares in enumerate(of_layer):
                    top = _HEIGHT + _GAP + layer * (_ROW * len(KINDS) + _GAP) + kind * _ROW
                    page[top : top + _ROW - 2, _LEFT : _LEFT + wide * total] = np.repeat(_colours(shares), wide, 0)
            page[_HEIGHT:, _LEFT + wide * t : _LEFT + wide * t + wide] |= 96  # now
            part.append(_told(page, f"timestep {t}, return {earned[t]:.0f}"))
        yield np.stack(part)


def _colours(shares: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Colours [T, 3] of shares [T]."""
    known = np.nan_to_num(shares)[:, None]
    colours = np.array(_EVICTED) + known * (np.array(_LIT) - np.array(_EVICTED))
    colours[np.isnan(shares)] = _DARK
    return colours.astype(np.uint8)


def _labels(layers: int, width: int, height: int) -> NDArray[np.uint8]:
    page = Image.new("RGB", (width, height), _DARK)
    pen = ImageDraw.Draw(page)
    for layer in range(layers):
        for kind, name in enumerate(KINDS):
            top = _HEIGHT + _GAP + layer * (_ROW * len(KINDS) + _GAP) + kind * _ROW
            pen.text((6, top - 1), f"layer {layer}, {name}", fill=(200, 200, 200))
    return np.array(page)


def _told(page: NDArray[np.uint8], text: str) -> NDArray[np.uint8]:
    image = Image.fromarray(page)
    ImageDraw.Draw(image).text((8, 8), text, fill=(40, 40, 40))
    return np.asarray(image)


def episode_picture(
    path: Path, watched: WatchedEpisode, robot: Robot, shown: int, moments: list[int], title: str
) -> None:
    """Frames of the robot, the return over time, and what is retained at the end, layers below each other.

    Args:
        path: of the png.
        watched: with bodies.
        robot: whose bodies they are.
        shown: how many frames, evenly spaced.
        moments: timesteps of near falls, marked.
        title: heads the picture.
    """
    total, layers = watched.episode.length, watched.shape[0]
    figure = Figure(figsize=(12, 3.6 + 0.75 * layers), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    parts: Any = figure.subfigures(2, 1, height_ratios=[1, 2.2 + 0.7 * layers])
    frames, below = parts
    chosen = np.linspace(0, total - 1, min(shown, total)).round().astype(int)
    for axes, t in zip(frames.subplots(1, len(chosen), squeeze=False)[0], chosen, strict=True):
        axes.imshow(robot.draw(watched.bodies[t], 160, 120))
        axes.set_title(f"{t}", fontsize="x-small")
        axes.axis("off")
    panels = below.subplots(layers + 1, 1, sharex=True, height_ratios=[2, *[1] * layers])
    panels[0].plot(np.cumsum(watched.episode.rewards), label="return so far")
    panels[0].plot(watched.episode.returns_to_go(), label="return to come")
    for moment in moments:
        panels[0].axvline(moment, color="tab:red", linewidth=0.8, alpha=0.6)
    panels[0].set_ylabel("return_raw", fontsize="small")
    panels[0].legend(fontsize="small", title="red: near falls" if moments else None, title_fontsize="small")
    for layer, shares in enumerate(strips(watched, total - 1)):
        axes = panels[layer + 1]
        axes.imshow(
            shares, aspect="auto", vmin=0, vmax=1, interpolation="nearest", extent=(-0.5, total - 0.5, 2.5, -0.5)
        )
        axes.set_yticks(range(len(KINDS)), KINDS, fontsize="x-small")
        axes.set_ylabel(f"layer {layer}", fontsize="small")
    panels[-1].set_xlabel("timestep; bright: retained at the end")
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110)


def episode_page(path: Path, watched: WatchedEpisode, robot: Robot, title: str) -> None:
    """A page that plays the robot; a frame has three bands, from the top: return, state and action of its timestep."""
    total = watched.episode.length
    frames = np.stack([robot.draw(bodies, 192, 192) for bodies in watched.bodies])
    retained = watched.retained(total - 1)[..., None]  # [L, K, T, 3, 1]
    write_page(path, frames, np.arange(total) * robot.dt, retained, title)
