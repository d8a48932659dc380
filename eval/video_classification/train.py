"""Training the packaged video encoder from scratch on one CPU core.

Drawing clips and encoding them as mp4 costs more than a training step, so a pool of clips is drawn once and shown in
many variants: mirrored (with the motion's name), and in other colours.
"""

import json
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from rich.progress import track
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from transformers import VivitForVideoClassification

from namm_transfer.eval.video import through_mp4
from namm_transfer.eval.video_classification.clips import FPS, MOTIONS, SIDE, TRAIN_SEEDS, make_clip, render
from namm_transfer.eval.video_classification.evaluate import held_out_accuracy
from namm_transfer.eval.video_classification.host import build_model, load_host, save_host
from namm_transfer.eval.video_training import Stage, Trainer

_MIRROR = {"left": "right", "right": "left", "clockwise": "counterclockwise", "counterclockwise": "clockwise"}
MIRRORED = np.array([MOTIONS.index(_MIRROR.get(motion, motion)) for motion in MOTIONS])
"""Label of a clip seen in a mirror, by its label."""


@dataclass(frozen=True)
class TrainConfig:
    """How the video encoder is trained; everything that the result depends on."""

    seed: int = 0
    stage: Stage = Stage("motion", steps=1600, batch=32, learning_rate=1e-3)
    pool: int = 3072
    path_weight: float = 30.0
    held_out_clips: int = 240
    threads: int = 1


class PathHead(nn.Module):
    """Reads the shape's centre at every tubelet from the encoder's tokens; dropped after training.

    Knowing where the shape is when is the first half of knowing how it moves.
    """

    def __init__(self, model: VivitForVideoClassification, generator: torch.Generator) -> None:
        super().__init__()
        self.frames_per_tubelet = model.config.tubelet_size[0]
        self.tubelets = model.config.num_frames // self.frames_per_tubelet
        hidden = model.config.hidden_size
        self.weight = nn.Parameter(torch.randn(3, hidden, generator=generator) * 0.02)

    def forward(self, states: torch.Tensor, paths: torch.Tensor) -> torch.Tensor:
        """Mean squared error in units of the frame's side; states [B, 1 + tokens, D], paths [B, T, 2] about 0."""
        tokens = states[:, 1:].float().unflatten(1, (self.tubelets, -1)) @ self.weight.T
        # A softmax over a tubelet's tokens says which of them read out the place.
        share = torch.softmax(tokens[..., :1], dim=2)
        place = (share * tokens[..., 1:]).sum(dim=2)
        return mse_loss(place, paths.unflatten(1, (self.tubelets, -1)).mean(dim=2))


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


def train(config: TrainConfig, out_dir: Path, *, resume: bool = True) -> VivitForVideoClassification:
    """Train, evaluate on held-out mp4 clips, and write weights and `training.json` to `out_dir`.

    The running state is kept in `out_dir/checkpoint.pt`; it is removed when training is done.

    Raises:
        CheckpointError: with `resume`, a checkpoint of another configuration is in the way.
    """
    torch.set_num_threads(config.threads)
    model = build_model(config.seed)
    head = PathHead(model, torch.Generator().manual_seed(config.seed))

    pool = ClipPool(config.pool, config.seed)

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = np.random.default_rng([config.seed, step])
        pixels, labels, paths = pool.batch(rng, config.stage.batch)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(pixels, output_hidden_states=True)
        path_error = head(output.hidden_states[2], paths)
        loss = cross_entropy(output.logits.float(), labels) + config.path_weight * path_error
        right = (output.logits.argmax(-1) == labels).float().mean().item()
        return loss, {"accuracy": right, "path": path_error.item() ** 0.5, "loss": loss.item()}

    settings = {"seed": config.seed, "pool": config.pool, "path_weight": config.path_weight}
    trainer = Trainer({"model": model, "head": head}, out_dir / "checkpoint.pt", settings, resume=resume)
    trainer.run(0, config.stage, [*model.parameters(), *head.parameters()], loss_at)
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
