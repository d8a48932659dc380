"""What a video LLM remembers of a video of any length: the memory, and where in the video it stands.

Shape letters: n steps of a batch, C channels, S sides of a frame in pixels, P patches of a step, D values of a patch or
of a token.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from namm_transfer.adapters.video_grid import base_of, check_marks, frames_of_step
from namm_transfer.adapters.video_steps import FrameLayout, Marks, Steps
from namm_transfer.errors import CacheError, ConfigError, UnsupportedModelError
from namm_transfer.memory import MemoryCache
from namm_transfer.scoring import Policy
from namm_transfer.stats import MemoryStats

__all__ = ["VideoMemory", "encode", "find_layout", "vision_inputs"]

KEY = "video"
"""Where a saved memory's metadata holds the video's part."""


@dataclass
class VideoMemory:
    """A video, as far as it was remembered; made by ``host.remember``, asked by ``host.generate(memory=...)``.

    Attributes:
        cache: the tokens retained.
        layout: how the host makes tokens of frames; None before the first one.
        frames: frames seen.
        timestamp: time of the newest of them in seconds, where the source told it.
        about: what the caller wants to be saved with it, as plain values.
        position: on a grid of time, height and width, where the video begins; or, where each step is a grid of its
            own, where it goes on.
    """

    cache: MemoryCache
    layout: FrameLayout | None = None
    frames: int = 0
    timestamp: float | None = None
    about: dict[str, Any] = field(default_factory=dict)
    position: int = 0

    def stats(self) -> MemoryStats:
        """What is held now, and what it costs."""
        return self.cache.stats()

    def save(self, path: str | Path) -> None:
        """Write the memory and its position in the video to one safetensors file, whole or not at all.

        Raises:
            CacheError: the file cannot be written.
        """
        state = {name: getattr(self, name) for name in ("frames", "timestamp", "about", "position")}
        layout = None if self.layout is None else asdict(self.layout)
        self.cache.save(path, {KEY: json.dumps({"layout": layout, **state})})

    @classmethod
    def load(cls, path: str | Path, policy: Policy) -> VideoMemory:
        """Read a memory back; ``policy`` must be the one it was saved with.

        Raises:
            CacheError: the file is missing, truncated or no memory of a video, or the policy is another one.
        """
        cache = MemoryCache.load(path, policy)
        try:
            with safe_open(path, "pt") as file:
                state = json.loads(file.metadata()[KEY])
            layout = None if state["layout"] is None else FrameLayout.from_plain(state["layout"])
            told = {name: state[name] for name in ("frames", "timestamp", "about", "position") if name in state}
            return cls(cache, layout, **told)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CacheError(f"{str(path)!r} holds a memory, but not of a video: {error!r}") from error


def find_layout(model: PreTrainedModel, first: Steps, marks: Marks, *, settled: bool = True) -> FrameLayout:
    """How ``model`` makes tokens of frames like the ``first`` ones.

    A video can be remembered as it comes if its prompt is the steps' tokens, each step's its own, in order, and no
    token sees a later step's. Both is tried out: on two random steps, together and alone, and on two short texts.

    Args:
        marks: token ids before and after the first step.
        settled: they are those of every step.

    Raises:
        UnsupportedModelError: it does not work so; says why.
        ConfigError: it needs other marks.
    """
    name, base = type(model).__name__, base_of(model)
    pixels = "pixel_values_videos" if hasattr(base, "get_video_features") else "pixel_values"
    takes = inspect.signature(_encoder(model, pixels)).parameters
    known = {pixels, "video_grid_thw"} if first.grid else {pixels}
    needed = [x for x, p in takes.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD and x not in known]
    if needed:
        raise UnsupportedModelError(
            f"{name} cannot take a frame by its pixels alone: it needs {', '.join(needed)} beside them"
        )
    if "token_type_ids" in inspect.signature(model.forward).parameters and not all(marks):
        raise ConfigError(
            f"{name} lets neighbouring image tokens see each other, so its frames must be held apart: pass the token "
            "ids before and after each as marks=(before, after)"
        )
    _check_causal(model)
    generator = torch.Generator().manual_seed(0)
    two = torch.randn(2, *first.pixels.shape[1:], generator=generator)
    batched = not first.grid and (pixels.endswith("_videos") or _takes_rows(model, pixels, two))
    layout = FrameLayout(
        pixels, batched, tuple(two.shape[1:]), 0, 0, marks if settled else None, first.grid, seconds=first.seconds
    )
    try:
        alone, other, both = (_features(encode(model, layout, x)) for x in (two[:1], two[1:], two))
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"{name} does not take frames of shape {tuple(two.shape[1:])}: {error}") from error
    tokens, closing = len(both) - len(alone), 2 * len(alone) - len(both)
    expected = torch.cat([alone[:tokens], other[:tokens], alone[tokens:]]) if tokens > 0 and closing >= 0 else None
    rounding = 1e-3 if model.dtype == torch.float32 else 0.05
    if expected is None or not torch.allclose(both, expected, rtol=0.0, atol=rounding * float(both.abs().max())):
        raise UnsupportedModelError(
            f"{name} cannot remember a video as it comes: the tokens of a frame depend on the frames around it "
            f"({len(alone)} tokens of one frame, {len(both)} of two)"
        )
    if closing and "mm_encoder_outputs" not in inspect.signature(base.forward).parameters:
        raise UnsupportedModelError(
            f"{name} puts {closing} tokens behind every video, and takes no mm_encoder_outputs that would go without"
        )
    step = frames_of_step(model) if first.grid else 1
    layout = replace(layout, tokens=tokens, closing=closing, step=step)
    if first.grid:
        check_marks(model, layout, marks)
    return layout


def encode(model: PreTrainedModel, layout: FrameLayout, frames: Tensor) -> Any:
    """The vision part's output (a BaseModelOutputWithPooling) for steps [n, C, S, S] or [n, P, D]."""
    return _encoder(model, layout.pixels)(**vision_inputs(model, layout, frames), return_dict=True)


def vision_inputs(model: PreTrainedModel, layout: FrameLayout, frames: Tensor) -> dict[str, Tensor]:
    """The model's inputs of steps [n, C, S, S] or [n, P, D]."""
    pixels = frames.to(model.device, model.dtype)
    if layout.grid is None:
        return {layout.pixels: pixels[None] if layout.batched else pixels}
    return {layout.pixels: pixels.flatten(0, 1), "video_grid_thw": layout.thw(len(pixels)).to(model.device)}


def _encoder(model: PreTrainedModel, pixels: str) -> Any:
    base = base_of(model)
    return base.get_video_features if pixels.endswith("_videos") else base.get_image_features


def _features(out: Any) -> Tensor:
    """[tokens, D]; models differ in how they group them."""
    found = out.pooler_output
    parts = found if isinstance(found, list | tuple) else [found]
    return torch.cat([part.flatten(0, -2) for part in parts]).float()


def _takes_rows(model: PreTrainedModel, pixels: str, frames: Tensor) -> bool:
    """Whether images come as [B, n, C, S, S] (SmolVLM) and not as [n, C, S, S]."""
    try:
        _encoder(model, pixels)(frames.to(model.device, model.dtype), return_dict=True)
    except (ValueError, IndexError, RuntimeError):
        return True
    return False


def _check_causal(model: PreTrainedModel) -> None:
    """Refuse a model whose first token sees the second: its prompt attends to itself as a whole."""
    ids = torch.tensor([[1, 2], [1, 3]], device=model.device)
    types = {"token_type_ids": torch.zeros_like(ids)} if _takes(model, "token_type_ids") else {}
    first = model(input_ids=ids, **types).logits[:, 0].float()
    if not torch.allclose(first[0], first[1], rtol=0.0, atol=1e-2 * float(first.abs().max())):
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot remember a video as it comes: its whole prompt attends to itself, so that "
            "what a frame's tokens are depends on the question that follows"
        )


def _takes(model: PreTrainedModel, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters
