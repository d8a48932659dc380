"""The packaged video encoder: a small ViViT that names the motion in a clip.

Shape letters: T frames, S side of a frame in pixels.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from transformers import VivitConfig, VivitForVideoClassification

from namm_transfer.errors import CheckpointError, DataError
from namm_transfer.eval.checkpoint import load_weights
from namm_transfer.eval.video_classification.clips import FRAMES, MOTIONS, SIDE

PACKAGED = Path(__file__).resolve().parent.parent / "assets" / "hosts" / "video_encoder"


@dataclass(frozen=True)
class VideoEncoderProcessor:
    """Turns decoded frames into the encoder's input."""

    frames: int = FRAMES
    side: int = SIDE

    def __call__(self, frames: np.ndarray) -> dict[str, torch.Tensor]:
        """`pixel_values` float32 [1, T, 3, S, S] in -1..1 from uint8 [T, S, S, 3] RGB.

        Raises:
            DataError: frames of another number, shape or type.
        """
        expected = (self.frames, self.side, self.side, 3)
        if frames.dtype != np.uint8 or frames.shape != expected:
            raise DataError(f"expected uint8 frames {list(expected)}, got {frames.dtype} {list(frames.shape)}")
        pixels = rearrange(torch.from_numpy(frames), "t h w c -> 1 t c h w")
        return {"pixel_values": pixels.float() / 127.5 - 1.0}


def build_model(seed: int) -> VivitForVideoClassification:
    """An untrained encoder, its weights drawn from `seed` without touching the global generator."""
    config = VivitConfig(
        image_size=SIDE,
        num_frames=FRAMES,
        tubelet_size=[2, 16, 16],
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        id2label=dict(enumerate(MOTIONS)),
        label2id={motion: label for label, motion in enumerate(MOTIONS)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VivitForVideoClassification(config)


def save_host(model: VivitForVideoClassification, path: Path) -> None:
    """Write float16 weights and the configuration to a folder; the model itself stays float32."""
    path.mkdir(parents=True, exist_ok=True)
    half = VivitForVideoClassification(model.config).half()
    half.load_state_dict(model.state_dict())
    half.save_pretrained(path)


def load_host(path: Path = PACKAGED) -> tuple[VivitForVideoClassification, VideoEncoderProcessor]:
    """The encoder in float32 evaluation mode, and its processor.

    Raises:
        CheckpointError: the folder lacks the weights or the configuration, or they cannot be read.
    """
    for name in ("model.safetensors", "config.json"):
        if not (path / name).is_file():
            raise CheckpointError(f"no {name} in {path}: expected a folder written by `train video_encoder`")
    model = load_weights(VivitForVideoClassification, path, "video encoder")
    config: Any = model.config
    return model, VideoEncoderProcessor(config.num_frames, config.image_size)
