"""Frames lit where a memory retains their patches, and an mp4 of them by layer and head.

Shape letters: L layers, K KV heads, T frames, n frames of a part, U steps in time (frames, or tubelets of several
frames), h, w patches, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from namm_transfer.eval.video import write_mp4

__all__ = ["DIMMED", "lit", "scaled", "write_lit_mp4"]

DIMMED = 0.2
"""Brightness of a patch that every head has evicted; each head that retains it adds an equal part of the rest."""
_LARGEST = 1920
"""Pixels of the longer side of a video, which every player still shows."""
_TILE = (32, 160)
_MARGIN, _GAP = 64, 4
_PART = 16


def lit(frames: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Dim what was evicted.

    Args:
        frames: uint8 [n, H, W, 3].
        share: [n, h, w] the part of the heads that retains each patch, 0 to 1.

    Returns:
        uint8 [n, H, W, 3].
    """
    (height, width), (rows, columns) = frames.shape[1:3], share.shape[1:]
    light = DIMMED + (1 - DIMMED) * share
    spread = light[:, np.arange(height) * rows // height][:, :, np.arange(width) * columns // width]
    return (frames * spread[..., None]).astype(np.uint8)


def scaled(frames: np.ndarray, side: int) -> np.ndarray:
    """Frames uint8 [n, H, W, 3] whose longer side has about `side` pixels, shapes kept."""
    height, width = frames.shape[1:3]
    factor = side / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR)) for frame in frames])


def write_lit_mp4(path: Path, frames: np.ndarray, retained: np.ndarray, fps: float) -> None:
    """A video of videos: a row per layer; in it all heads together, then each one. The plain clip is above them.

    Args:
        path: of the mp4.
        frames: uint8 [T, H, W, 3].
        retained: bool [L, K, U, h, w].
        fps: frames a second.
    """
    layers, heads = retained.shape[:2]
    columns = heads + 1 if heads > 1 else 1
    room = min((_LARGEST - _MARGIN) // columns, (_LARGEST - 24) // (layers + 1)) - _GAP
    side = min(max(room, _TILE[0]), _TILE[1])
    height, width = scaled(frames[:1], side).shape[1:3]
    page = _labels(layers, columns, height, width)
    write_mp4(path, _parts(frames, retained, page, (height, width), side), fps)


def _parts(
    frames: np.ndarray, retained: np.ndarray, page: np.ndarray, tile: tuple[int, int], side: int
) -> Iterator[np.ndarray]:
    steps, (height, width) = retained.shape[2], tile
    for first in range(0, len(frames), _PART):
        numbers = np.arange(first, min(first + _PART, len(frames)))
        small = scaled(frames[numbers], side)
        kept = retained[:, :, numbers * steps // len(frames)]  # [L, K, n, h, w]
        out = np.repeat(page[None], len(numbers), axis=0)
        out[:, _GAP : _GAP + height, _MARGIN : _MARGIN + width] = small
        for layer, of_layer in enumerate(kept):
            shares = [of_layer.mean(0), *(of_layer if len(of_layer) > 1 else ())]
            for column, share in enumerate(shares):
                top, left = (layer + 1) * (height + _GAP) + _GAP, _MARGIN + column * (width + _GAP)
                out[:, top : top + height, left : left + width] = lit(small, share)
        yield out


def _labels(layers: int, columns: int, height: int, width: int) -> np.ndarray:
    """The page behind the tiles, uint8, with even sides as H.264 wants them."""
    size = (_MARGIN + columns * (width + _GAP), (layers + 1) * (height + _GAP) + _GAP)
    page = Image.new("RGB", (size[0] + size[0] % 2, size[1] + size[1] % 2), (24, 24, 24))
    draw = ImageDraw.Draw(page)
    for row in range(layers + 1):
        text = "clip" if row == 0 else f"layer {row - 1}"
        draw.text((6, row * (height + _GAP) + height // 2 - 4), text, fill=(220, 220, 220))
    for column in range(1, columns):  # beside the plain clip there is room
        text = f"head {column - 1}"
        draw.text((_MARGIN + column * (width + _GAP) + 2, height - 10), text, fill=(220, 220, 220))
    if columns > 1:
        draw.text((6, height - 2), "all heads", fill=(160, 160, 160))
    return np.array(page)
