"""The packaged video encoders: small transformers of three architectures that name the motion in a clip.

Shape letters: T frames, S side of a frame in pixels, U steps in time (tubelets, or frames on a strip), h, w patches.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from einops import rearrange
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from transformers import (
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VivitConfig,
    VivitForVideoClassification,
)

from namm_transfer.errors import CheckpointError, ConfigError, DataError
from namm_transfer.eval.checkpoint import load_weights
from namm_transfer.eval.video_classification.clips import FRAMES, MOTIONS, SIDE
from namm_transfer.eval.video_classification.film_strip import STRIDE, FilmStrip

__all__ = [
    "ARCHITECTURES",
    "PACKAGED",
    "PACKAGED_HOSTS",
    "VideoEncoder",
    "VideoEncoderProcessor",
    "build_model",
    "load_host",
    "save_host",
    "token_grid",
]

VideoEncoder = VivitForVideoClassification | VideoMAEForVideoClassification | FilmStrip

_HOSTS = Path(__file__).resolve().parent.parent / "assets" / "hosts"
PACKAGED = _HOSTS / "video_encoder"
PACKAGED_HOSTS: dict[str, Path] = {"vivit": PACKAGED, "videomae": _HOSTS / "videomae", "timm_vit": _HOSTS / "timm_vit"}
"""Folders of the packaged encoders, by architecture."""
PATCH = 16
_SIZE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "num_frames": FRAMES,
    "id2label": dict(enumerate(MOTIONS)),
    "label2id": {motion: label for label, motion in enumerate(MOTIONS)},
}
_STRIP: dict[str, Any] = {
    "img_size": [FRAMES // STRIDE * SIDE, SIDE],
    "patch_size": PATCH,
    "embed_dim": 128,
    "depth": 4,
    "num_heads": 4,
    "mlp_ratio": 3.0,
    "class_token": False,
    "global_pool": "avg",  # the mean of all patches is classified
}


def _vivit() -> VivitForVideoClassification:
    return VivitForVideoClassification(VivitConfig(tubelet_size=[2, PATCH, PATCH], **_SIZE))


def _videomae() -> VideoMAEForVideoClassification:
    return VideoMAEForVideoClassification(VideoMAEConfig(tubelet_size=2, patch_size=PATCH, **_SIZE))


def _timm_vit() -> FilmStrip:
    vit: Any = timm.create_model("vit_tiny_patch16_224", num_classes=len(MOTIONS), **_STRIP)
    # timm starts positions at a sixteenth of what the patches are: too faint to learn from them which frame was first.
    places = build_sincos2d_pos_embed(list(vit.patch_embed.grid_size), dim=_STRIP["embed_dim"], temperature=100.0)
    vit.pos_embed.data.copy_(places.unsqueeze(0))
    return FilmStrip(vit, MOTIONS, _STRIP)


ARCHITECTURES: dict[str, Callable[[], VideoEncoder]] = {"vivit": _vivit, "videomae": _videomae, "timm_vit": _timm_vit}
_CLASSES: dict[str, type[VivitForVideoClassification] | type[VideoMAEForVideoClassification]] = {
    "vivit": VivitForVideoClassification,
    "videomae": VideoMAEForVideoClassification,
}


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


def build_model(seed: int, architecture: str = "vivit") -> VideoEncoder:
    """An untrained encoder, its weights drawn from `seed` without touching the global generator.

    Raises:
        ConfigError: there is no such architecture.
    """
    _check_architecture(architecture)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ARCHITECTURES[architecture]()


def token_grid(model: VideoEncoder) -> tuple[int, int, int]:
    """Steps in time, rows and columns (U, h, w) of an encoder's patches."""
    config: Any = model.config
    size = config.tubelet_size
    depth, height, width = (size, config.patch_size, config.patch_size) if isinstance(size, int) else size
    return config.num_frames // depth, config.image_size // height, config.image_size // width


def save_host(model: VideoEncoder, path: Path) -> None:
    """Write float16 weights and the configuration to a folder; the model itself stays float32."""
    path.mkdir(parents=True, exist_ok=True)
    if isinstance(model, FilmStrip):
        model.save(path)
        return
    kind: Any = type(model)
    half = kind(model.config).half()
    half.load_state_dict(model.state_dict())
    half.save_pretrained(path)


def load_host(path: Path = PACKAGED) -> tuple[VideoEncoder, VideoEncoderProcessor]:
    """The encoder in float32 evaluation mode, and its processor; the architecture is what config.json says.

    Raises:
        CheckpointError: the folder lacks the weights or the configuration, or they cannot be read.
    """
    for name in ("model.safetensors", "config.json"):
        if not (path / name).is_file():
            raise CheckpointError(f"no {name} in {path}: expected a folder written by `train video_encoder`")
    try:
        written = json.loads((path / "config.json").read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} holds no readable video encoder: config.json: {error}") from error
    kind, strip = written.get("model_type"), "architecture" in written
    if not strip and kind not in _CLASSES:
        raise CheckpointError(f"{path} holds a model of type {kind!r}; expected one of {', '.join(ARCHITECTURES)}")
    model = FilmStrip.load(path) if strip else load_weights(_CLASSES[kind], path, "video encoder")
    config: Any = model.config
    return model, VideoEncoderProcessor(config.num_frames, config.image_size)


def _check_architecture(architecture: str) -> None:
    if architecture not in ARCHITECTURES:
        raise ConfigError(f"no video encoder {architecture!r}; expected one of {', '.join(ARCHITECTURES)}")
