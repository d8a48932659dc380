"""Training a packaged video encoder from scratch on one CPU core.

Drawing clips and encoding them as mp4 costs more than a training step, so a pool of clips is drawn once and shown in
many variants: mirrored (with the motion's name), and in other colours.
"""

import json
import shlex
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from rich.progress import track
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from transformers import PreTrainedModel

from namm_transfer.configs.settings import check_at_least_one
from namm_transfer.eval.video import through_mp4
from namm_transfer.eval.video_classification.clips import FPS, MOTIONS, SIDE, TRAIN_SEEDS, make_clip, render
from namm_transfer.eval.video_classification.evaluate import held_out_accuracy
from namm_transfer.eval.video_classification.host import (
    VideoEncoder,
    build_model,
    load_host,
    save_host,
    token_grid,
)
from namm_transfer.eval.video_training import Stage, Trainer, check_stages, is_finished

_MIRROR = {"left": "right", "right": "left", "clockwise": "counterclockwise", "counterclockwise": "clockwise"}
MIRRORED = np.array([MOTIONS.index(_MIRROR.get(motion, motion)) for motion in MOTIONS])
"""Label of a clip seen in a mirror, by its label."""
DEFAULT_STAGES = {
    "vivit": (Stage("motion", steps=1600, batch=32, learning_rate=1e-3),),
    "videomae": (Stage("motion", steps=1200, batch=32, learning_rate=1e-3),),
    "timm_vit": (Stage("motion", steps=1200, batch=32, learning_rate=1e-3),),
}
FIGURES = {"motion": ("accuracy",)}
"""The one kind of stages, and the figure that a goal can be set for: the others are losses, which fall."""
PATH_STATES = -3
"""Where the path is read: two blocks before the last."""


@dataclass(frozen=True)
class TrainConfig:
    """How a video encoder is trained; everything that the result depends on.

    Attributes:
        architecture: `vivit`, `videomae` or `timm_vit`.
        stages: null: those of `DEFAULT_STAGES`, by which the packaged ones were trained.
    """

    seed: int = 0
    architecture: str = "vivit"
    stages: tuple[Stage, ...] | None = None
    pool: int = 3072
    path_weight: float = 30.0
    held_out_clips: int = 240
    threads: int = 1

    def __post_init__(self) -> None:
        check_at_least_one(self, "pool", "held_out_clips", "threads")
        check_stages(self.stages or (), FIGURES)


class PathHead(nn.Module):
    """Reads the shape's centre at every step in time from the encoder's tokens; dropped after training.

    Knowing where the shape is when is the first half of knowing how it moves.
    """

    def __init__(self, model: VideoEncoder, generator: torch.Generator) -> None:
        super().__init__()
        self.steps, height, width = token_grid(model)
        self.patches = self.steps * height * width
        hidden = next(p.shape[0] for p in model.parameters() if p.ndim > 3)  # the projection of patches
        self.weight = nn.Parameter(torch.randn(3, hidden, generator=generator) * 0.02)

    def forward(self, states: torch.Tensor, paths: torch.Tensor) -> torch.Tensor:
        """Mean squared error in units of the frame's side; states [B, N, D], patches last, paths [B, T, 2] about 0."""
        tokens = states[:, -self.patches :].float().unflatten(1, (self.steps, -1)) @ self.weight.T
        # A softmax over the patches of one step in time says which of them read out the place.
        share = torch.softmax(tokens[..., :1], dim=2)
        place = (share * tokens[..., 1:]).sum(dim=2)
        return mse_loss(place, paths.unflatten(1, (self.steps, -1)).mean(dim=2))


class ClipPool:
    """Clips of the training split, drawn, encoded and decoded once."""

    def __init__(self, size: int, seed: int) -> None:
        seeds = np.random.default_rng([seed, 1]).integers(TRAIN_SEEDS, 2**40, size=size)
        clips = [make_clip(int(number)) for number in seeds]
        self.frames = np.stack([through_mp4(render(clip), FPS) for clip in track(clips, "drawing clips")])
        self.paths = np.stack([clip.path for clip in clips]).astype(np.float32) / SIDE - 0.5
        self.labels = np.array([clip.label for clip in clips])

    def batch(self, rng: np.random.Generator, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pixels float [B, T, 3, S, S] in -1..1, labels [B], paths [B, T, 2]; half of the clips are mirrored."""
        index = rng.integers(len(self.labels), size=size)
        frames, paths, labels = self.frames[index], self.paths[index].copy(), self.labels[index].copy()
        frames = np.stack([clip[..., rng.permutation(3)] for clip in frames])
        mirrored = rng.random(size) < 0.5
        frames[mirrored] = frames[mirrored, :, :, ::-1]
        paths[mirrored, :, 0] *= -1
        labels[mirrored] = MIRRORED[labels[mirrored]]
        pixels = rearrange(torch.from_numpy(frames), "b t h w c -> b t c h w").float() / 127.5 - 1.0
        return pixels, torch.from_numpy(labels), torch.from_numpy(paths)


def train(config: TrainConfig, out_dir: Path, *, resume: bool = True) -> VideoEncoder:
    """Train, evaluate on held-out mp4 clips, and write weights and `training.json` to `out_dir`.

    The running state is kept in `out_dir/checkpoint.pt`; it is removed when training is done.

    Raises:
        CheckpointError: with `resume`, a checkpoint or a host of another configuration is in the way.
        ConfigError: there is no such architecture.
    """
    torch.set_num_threads(config.threads)
    model = build_model(config.seed, config.architecture)
    stages = config.stages or DEFAULT_STAGES[config.architecture]
    config = replace(config, stages=stages)
    if resume and is_finished(out_dir, asdict(config), asdict(TrainConfig())):
        return load_host(out_dir)[0]
    _use_plain_attention(model)
    head = PathHead(model, torch.Generator().manual_seed(config.seed))
    settings = {key: getattr(config, key) for key in ("seed", "architecture", "pool", "path_weight")}
    trainer = Trainer({"model": model, "head": head}, out_dir / "checkpoint.pt", settings, resume=resume)
    pool = ClipPool(config.pool, config.seed)

    def loss_at(size: int, before: int, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = np.random.default_rng([config.seed, before + step])
        pixels, labels, paths = pool.batch(rng, size)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(pixels, output_hidden_states=True)
        path_error = head(output.hidden_states[PATH_STATES], paths)
        loss = cross_entropy(output.logits.float(), labels) + config.path_weight * path_error
        right = (output.logits.argmax(-1) == labels).float().mean().item()
        return loss, {"accuracy": right, "path": path_error.item() ** 0.5, "loss": loss.item()}

    for number, stage in enumerate(stages):
        before = sum(earlier.steps for earlier in stages[:number])
        trainer.run(number, stage, [*model.parameters(), *head.parameters()], partial(loss_at, stage.batch, before))
    save_host(model, out_dir)
    record = {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "config": asdict(config),
        "seconds": round(trainer.seconds),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "held_out": held_out_accuracy(*load_host(out_dir), config.held_out_clips),
        "history": trainer.history,
    }
    (out_dir / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    (out_dir / "checkpoint.pt").unlink()
    return load_host(out_dir)[0]


def _use_plain_attention(model: VideoEncoder) -> None:
    """Matrix products as they are written: for so few tokens their backward pass is the fastest on a CPU."""
    if isinstance(model, PreTrainedModel):
        model.set_attn_implementation("eager")
        return
    modules: Any = model.modules()
    for module in modules:
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
