"""Pictures of what a memory retains of an episode, and the counts behind it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from namm_transfer.errors import ConfigError
from namm_transfer.eval.offline_rl.agent import KINDS
from namm_transfer.eval.offline_rl.drawing import robot_of
from namm_transfer.eval.offline_rl.episode_pictures import episode_mp4, episode_page, episode_picture
from namm_transfer.eval.offline_rl.falls import near_falls
from namm_transfer.eval.provenance import record
from namm_transfer.eval.rl_tasks import Episodes
from namm_transfer.files import write_atomically
from namm_transfer.policies import Policy

__all__ = ["inspect_episode"]


def inspect_episode(config: Mapping[str, Any], task: Episodes, policy: Policy, out: Path, console: Console) -> Path:
    """Play one episode under one policy; write `retained` as png, mp4, html and json, and provenance, to `out`.

    Raises:
        ConfigError: settings out of range.
        DataError: the robot cannot be drawn, or the episode cannot be played.
    """
    units, number, shown = task.units(config["seed"]), config["clip"], config["frames"]
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(units):
        raise ConfigError(f"clip is {number!r}; expected the number of an episode, 0 to {len(units) - 1}")
    if isinstance(shown, bool) or not isinstance(shown, int) or shown < 1:
        raise ConfigError(f"frames is {shown!r}; expected an integer of at least 1")
    robot = robot_of(task.env_id)
    out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written is told before anything is played
    record(out / "provenance.json", task.inputs(), config["seed"])
    (watched,) = task.watch([units[number]], policy, bodies=True)
    episode = watched.episode
    moments = near_falls(episode, task.env_id)
    retained = watched.retained(episode.length - 1)  # [L, K, T, 3]
    counts = {
        "task": task.name,
        "environment": task.env_id,
        "seed_of_environment": episode.seed,
        "policy": policy.describe(),
        "return_raw": episode.return_raw,
        "length": episode.length,
        "terminated": episode.terminated,
        "near_falls": moments,
        "decisions": len(watched.decisions),
        "kept_fraction": float(retained.mean()),
        "kept_fraction_by_layer_and_head": retained.mean(axis=(2, 3)).round(4).tolist(),
        "kept_fraction_by_kind": dict(zip(KINDS, retained.mean(axis=(0, 1, 2)).round(4).tolist(), strict=True)),
        "retained_by_layer_and_timestep": retained.sum(axis=(1, 3)).tolist(),
    }
    write_atomically(out / "retained.json", json.dumps(counts, indent=2) + "\n")
    title = (
        f"{task.name}, seed {episode.seed}, {policy.name}: return {episode.return_raw:.0f} in {episode.length} "
        f"timesteps, {retained.mean():.1%} of the tokens retained"
    )
    episode_picture(out / "retained.png", watched, robot, shown, moments or [], title)
    episode_mp4(out / "retained.mp4", watched, robot)
    bands = "bands of a frame, from the top: return, state, action"
    episode_page(out / "retained.html", watched, robot, f"{title}; {bands}")
    for layer, part in enumerate(retained):
        by_kind = dict(zip(KINDS, np.round(part.mean(axis=(0, 1)), 3).tolist(), strict=True))
        console.print(f"layer {layer}: {part.mean():6.1%} retained, {by_kind}")
    console.print(f"written: {out / 'retained'}.png, .mp4, .html and .json")
    return out
