"""An image model that sees a clip as a strip of film: one tall picture of frames below each other.

An image transformer has no notion of time, and frame by frame it cannot tell a motion from a place. On the strip it
can: attention reaches from every frame to every other one, and the rows of patches, which come frame by frame, put
the tokens into the temporal order that a memory evicts in. The model itself is timm's, unmodified.

Shape letters: B clips, T frames, S side of a frame in pixels, N patches, D width.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from einops import rearrange
from safetensors import SafetensorError
from timm.models import save_for_hf
from torch import nn

from namm_transfer.errors import CheckpointError

__all__ = ["STRIDE", "FilmStrip", "FilmStripConfig", "FilmStripOutput"]

STRIDE = 2
"""Every second frame is on the strip: as many tokens as the encoders have that join two frames in a tubelet."""


@dataclass(frozen=True)
class FilmStripConfig:
    """What a clip must be like, and what the classes are called; names are those of transformers' encoders."""

    num_frames: int
    image_size: int
    patch_size: int
    tubelet_size: int
    id2label: Mapping[int, str]


@dataclass(frozen=True)
class FilmStripOutput:
    """Logits [B, classes], and the patches [B, N, D] after every block if they were asked for."""

    logits: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None = None


class FilmStrip(nn.Module):
    """A vision transformer of timm behind the interface of a video classifier.

    Args:
        vit: made by `timm.create_model`; its image has the size of the strip.
        labels: names of the classes.
        arguments: those of `timm.create_model` by which the transformer differs from the architecture it is named by.
    """

    def __init__(self, vit: Any, labels: Sequence[str], arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.vit = vit
        self.arguments = dict(arguments)
        height, width = self.vit.patch_embed.img_size
        self.config = FilmStripConfig(
            num_frames=height // width * STRIDE,
            image_size=width,
            patch_size=self.vit.patch_embed.patch_size[0],
            tubelet_size=STRIDE,
            id2label=dict(enumerate(labels)),
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool = False) -> FilmStripOutput:
        """Classify clips [B, T, 3, S, S]."""
        strip = rearrange(pixel_values[:, ::STRIDE], "b t c h w -> b c (t h) w")
        if not output_hidden_states:
            return FilmStripOutput(self.vit(strip))
        tokens, states = self.vit.forward_intermediates(strip, output_fmt="NLC")
        return FilmStripOutput(self.vit.forward_head(tokens), tuple(states))

    def save(self, path: Path) -> None:
        """Write a folder that `timm.create_model("local-dir:PATH", pretrained=True)` reads too, weights in float16."""
        labels = list(self.config.id2label.values())
        save_for_hf(
            copy.deepcopy(self.vit).half(),
            str(path),
            model_config={"label_names": labels, "pretrained_cfg": {"tag": "motion"}},
            model_args=self.arguments,
            safe_serialization=True,
        )

    @classmethod
    def load(cls, path: Path) -> FilmStrip:
        """What :meth:`save` wrote, in float32 evaluation mode.

        Raises:
            CheckpointError: a file is unreadable, or the weights do not fit the configuration.
        """
        try:
            written = json.loads((path / "config.json").read_text())
            vit = timm.create_model(f"local-dir:{path}", pretrained=True)
            return cls(vit, written["label_names"], written["model_args"]).eval()
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"{path} holds no readable video encoder: {error}") from error
        except RuntimeError as error:
            raise CheckpointError(f"the weights of {path} do not fit config.json: {error}") from error
