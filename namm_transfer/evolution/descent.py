"""Gradient steps before a search, so that it need not find from zero what a gradient can tell.

A generation of 32 candidates tells a search of 4,172 parameters little: it says how 32 points compare. A relaxed
reading (see `relaxed`) says of every parameter where to go, on the same samples, at the same price per kept token, and
costs less than a twentieth of a generation's sample. What the relaxation cannot see is left to the search.

Not in the published method, whose search begins at zero: `descent_steps=0`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from namm_transfer.errors import DataError
from namm_transfer.evolution.calibration import with_vector
from namm_transfer.evolution.config import EvolutionConfig
from namm_transfer.evolution.imitation import begun
from namm_transfer.evolution.journal import Journal
from namm_transfer.evolution.loop import progress_bar
from namm_transfer.evolution.readers import Job, Readers
from namm_transfer.evolution.relaxed import RelaxedReading
from namm_transfer.files import replacing
from namm_transfer.network import NAMM

__all__ = ["descend"]

_DESCENT = 5
"""First entry of the keys of samples; see `run`."""
_STATE = "descent.safetensors"
_WARM_UP = 5
_MOMENTS = (0.9, 0.98)


def descend(
    config: EvolutionConfig,
    readers: Readers,
    namm: NAMM,
    folder: Path,
    journal: Journal,
    console: Console | None = None,
    start: Tensor | None = None,
) -> np.ndarray:
    """Adam on relaxed readings of training documents; goes on with a descent that `folder` holds.

    Args:
        config: of the evolution.
        readers: where samples are read.
        namm: gives the feature normaliser.
        folder: for `descent.safetensors`, the state after the last step.
        journal: gets a record of each step.
        console: shows the progress.
        start: [4172] where it begins; None for small random weights.

    Returns:
        [4172] where it ended.

    Raises:
        DataError: the state cannot be read, or no sample of a step had a gradient.
    """
    vector = nn.Parameter(begun(config) if start is None else start.clone())
    adam = torch.optim.Adam([vector], betas=_MOMENTS, maximize=True)
    step = _resume(folder / _STATE, vector, adam)
    budgets = [str(budget) if budget else "threshold" for budget in dict.fromkeys(config.budgets)]
    with progress_bar(console) as progress:
        task = progress.add_task("descent", total=config.descent_steps, completed=step, status="")
        while step < config.descent_steps:
            started = time.monotonic()
            numbers = range(step * config.descent_samples, (step + 1) * config.descent_samples)
            jobs = [Job("train", (_DESCENT, i), i, len(config.kinds)) for i in numbers]
            here = with_vector(namm, vector.detach().numpy())
            readings = [found for found in readers.differentiate(jobs, here) if found is not None]
            if not readings:
                raise DataError(f"none of {len(jobs)} samples has a decision before half of its answers")
            vector.grad = _mean_gradient(readings)
            adam.param_groups[0]["lr"] = _rate(step, config)
            adam.step()
            step += 1
            _save(folder / _STATE, vector, adam)
            difference = torch.stack([found.difference for found in readings]).mean(0).tolist()
            kept = torch.stack([found.kept for found in readings]).mean(0).tolist()
            journal.append(
                "descent",
                step=step,
                difference=dict(zip(budgets, difference, strict=True)),
                kept=dict(zip(budgets, kept, strict=True)),
                seconds=round(time.monotonic() - started, 2),
            )
            status = "  ".join(f"{name} {value:+.2f}" for name, value in zip(budgets, difference, strict=True))
            progress.update(task, completed=step, status=status)
    return vector.detach().double().numpy()


def _mean_gradient(readings: Sequence[RelaxedReading]) -> Tensor:
    """[4172]; each reading's is cut to length 1, since hopeless samples have the longest."""
    return torch.stack([found.gradient / found.gradient.norm().clamp_min(1.0) for found in readings]).mean(0)


def _rate(step: int, config: EvolutionConfig) -> float:
    """Warmed up, then falling along half a cosine to a twentieth."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.descent_steps))
    return config.descent_rate * min(1.0, (step + 1) / _WARM_UP) * (0.05 + 0.95 * cosine)


def _save(path: Path, vector: nn.Parameter, adam: torch.optim.Adam) -> None:
    with replacing(path) as partial:
        save_file({"vector": vector.detach(), **adam.state[vector]}, partial)


def _resume(path: Path, vector: nn.Parameter, adam: torch.optim.Adam) -> int:
    """Take up a saved state, if there is one. Returns the steps done."""
    if not path.exists():
        return 0
    try:
        state: dict[str, Any] = load_file(path)
        with torch.no_grad():
            vector.copy_(state.pop("vector"))
        adam.state[vector] = state
        return int(state["step"])
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise DataError(f"cannot go on with the descent of {path}: {type(error).__name__}: {error}") from error
