"""The training loop of the packaged video hosts: stages, resumable at any step, reproducible from a seed."""

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from namm_transfer.configs.settings import check_at_least_one
from namm_transfer.errors import CheckpointError, ConfigError
from namm_transfer.eval.claim import as_stored, differing
from namm_transfer.files import replacing

SECONDS_BETWEEN_CHECKPOINTS = 60.0
WARM_UP_STEPS = 40
FINAL_FRACTION = 0.05
GOAL_STEPS = 30
LOG_STEPS = 25

LossAt = Callable[[int], tuple[torch.Tensor, dict[str, float]]]
"""Loss of a step number, drawing its data from that number alone, and figures to show beside it."""


@dataclass(frozen=True)
class Stage:
    """One stretch of training with its own learning rate.

    With a `goal` the rate stays constant after the warm-up, and the stage ends early once the mean of its
    `figure` over `GOAL_STEPS` steps reaches the goal; without one the rate decays over all `steps`.
    """

    name: str
    steps: int
    batch: int
    learning_rate: float
    frames: int = 0
    goal: float | None = None
    figure: str = ""

    def __post_init__(self) -> None:
        check_at_least_one(self, "steps", "batch")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"Stage.learning_rate is {self.learning_rate}; expected a positive number")


def check_stages(stages: Sequence[Stage], figures: Mapping[str, Sequence[str]]) -> None:
    """Refuse stages of an unknown name, or with a goal for a figure that they do not have.

    Args:
        figures: the names of stages, and the figures of each that a goal can be set for.

    Raises:
        ConfigError: names the stage.
    """
    for number, stage in enumerate(stages):
        if stage.name not in figures:
            raise ConfigError(f"stages[{number}].name is {stage.name!r}; expected one of {', '.join(figures)}")
        if stage.goal is not None and stage.figure not in figures[stage.name]:
            known = ", ".join(figures[stage.name])
            if not known:
                raise ConfigError(
                    f"stages[{number}].goal is {stage.goal}; a stage {stage.name!r} has no goal: expected null"
                )
            raise ConfigError(f"stages[{number}].figure is {stage.figure!r}; expected one of {known}")


def is_finished(out_dir: Path, config: Mapping[str, Any], usual: Mapping[str, Any]) -> bool:
    """Whether the folder holds a host that was trained with these settings, of which nothing is left to do.

    Args:
        usual: what a setting was for hosts that were trained before there was one.

    Raises:
        CheckpointError: it holds one of other settings, which would be lost; or what it says of them cannot be read.
    """
    told = out_dir / "training.json"
    if not told.is_file() or (out_dir / "checkpoint.pt").is_file():
        return False
    try:
        stored = {**as_stored(usual), **json.loads(told.read_text())["config"]}
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{told} does not say how its host was trained ({type(error).__name__}: {error}): train into another folder"
        ) from error
    expected = as_stored(config)
    if stored != expected:
        other = ", ".join(differing(stored, expected))
        raise CheckpointError(
            f"{out_dir} holds a host that was trained with another {other}: train into another folder"
        )
    return True


class Trainer:
    """Runs stages in order and writes a checkpoint that a later run continues from.

    Args:
        modules: everything that is saved, by name.
        checkpoint: file of the running state.
        settings: what every stage depends on; a checkpoint of other settings is refused. Stages are compared
            one by one in `run`, so that the plan for those not yet begun may change.
        resume: continue from `checkpoint` where it exists, else start anew.

    Raises:
        CheckpointError: the checkpoint belongs to other settings.
    """

    def __init__(
        self, modules: dict[str, nn.Module], checkpoint: Path, settings: dict[str, Any], *, resume: bool
    ) -> None:
        self.modules = modules
        self.checkpoint = checkpoint
        self.settings = settings
        self.seconds = 0.0
        self.history: list[dict[str, Any]] = []
        self._begun: list[dict[str, Any]] = []
        self._state: dict[str, Any] = {"stage": 0, "step": 0, "optimizer": None}
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        if resume and checkpoint.is_file():
            self._load()

    def run(self, number: int, stage: Stage, parameters: Iterable[nn.Parameter], loss_at: LossAt) -> None:
        """Train one stage, skipping what the checkpoint has already done.

        A resumed stage forgets the recent figures, so that it may run up to `GOAL_STEPS` further than an
        uninterrupted one.

        Raises:
            CheckpointError: the checkpoint has run this stage differently.
        """
        if number < len(self._begun) and self._begun[number] != asdict(stage):
            raise CheckpointError(
                f"{self.checkpoint} ran stage {number} as {self._begun[number]}, not as {asdict(stage)}: "
                "remove it, or train into another folder"
            )
        if self._state["stage"] > number:
            return
        self._begun[number:] = [asdict(stage)]
        trained = list(parameters)
        optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.98), weight_decay=0.01)
        first = 0
        if self._state["stage"] == number and self._state["optimizer"] is not None:
            optimizer.load_state_dict(self._state["optimizer"])
            first = self._state["step"]
        recent: deque[dict[str, float]] = deque(maxlen=GOAL_STEPS)
        saved = mark = time.monotonic()
        with _progress() as progress:
            task = progress.add_task(stage.name, total=stage.steps, completed=first, figures="")
            for step in range(first, stage.steps):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, stage)
                loss, figures = loss_at(step)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                recent.append(figures)
                means = {key: sum(entry[key] for entry in recent) / len(recent) for key in figures}
                shown = " ".join(f"{key} {value:.3f}" for key, value in means.items())
                progress.update(task, advance=1, figures=shown)
                now = time.monotonic()
                self.seconds, mark = self.seconds + now - mark, now
                if step % LOG_STEPS == 0 or step == stage.steps - 1:
                    self.history.append({"stage": number, "step": step, **means})
                    if not progress.console.is_terminal:
                        progress.console.print(f"{stage.name} {step}/{stage.steps} {self.seconds:.0f}s {shown}")
                if stage.goal is not None and len(recent) == GOAL_STEPS and means[stage.figure] >= stage.goal:
                    break
                if now - saved > SECONDS_BETWEEN_CHECKPOINTS:
                    self._save(number, step + 1, optimizer.state_dict())
                    saved = now
        self._save(number + 1, 0, None)

    def _save(self, stage: int, step: int, optimizer: dict[str, Any] | None) -> None:
        self._state = {"stage": stage, "step": step, "optimizer": optimizer}
        state = {
            **self._state,
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "settings": self.settings,
            "begun": self._begun,
            "seconds": self.seconds,
            "history": self.history,
        }
        with replacing(self.checkpoint) as partial:
            torch.save(state, partial)

    def _load(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        if state["settings"] != self.settings:
            raise CheckpointError(
                f"{self.checkpoint} was written with {state['settings']}, not with {self.settings}: "
                "remove it, or train into another folder"
            )
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        self.seconds, self.history, self._begun = state["seconds"], state["history"], state["begun"]
        self._state = {key: state[key] for key in ("stage", "step", "optimizer")}


def learning_rate(step: int, stage: Stage) -> float:
    """Linear warm-up, then constant (with a goal) or cosine decay to `FINAL_FRACTION` of the peak."""
    warm = min(1.0, (step + 1) / WARM_UP_STEPS)
    if stage.goal is not None:
        return stage.learning_rate * warm
    cosine = 0.5 * (1.0 + math.cos(math.pi * step / stage.steps))
    return stage.learning_rate * warm * (FINAL_FRACTION + (1.0 - FINAL_FRACTION) * cosine)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
