"""A page that plays a clip with its retained patches lit, layer by layer and head by head; one file, no network.

Shape letters: L layers, K KV heads, T frames, U steps in time, h, w patches.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from namm_transfer.eval.lighting import DIMMED, scaled
from namm_transfer.files import write_atomically

__all__ = ["write_page"]

_TEMPLATE = Path(__file__).parent / "assets" / "inspect.html"
_SIDE = 192
_MOST_FRAMES = 256


def write_page(path: Path, frames: np.ndarray, timestamps: np.ndarray, retained: np.ndarray, title: str) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        frames: uint8 [T, H, W, 3]; of long clips 256, evenly spaced.
        timestamps: [T] seconds.
        retained: bool [L, K, U, h, w].
        title: heads the page.
    """
    steps = retained.shape[2]
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), _MOST_FRAMES)).round().astype(int))
    data = {
        "title": title,
        "dimmed": DIMMED,
        "shape": list(retained.shape),
        "bits": base64.b64encode(np.packbits(retained, bitorder="little").tobytes()).decode(),
        "frames": [_picture(frame) for frame in scaled(frames[chosen], _SIDE)],
        "numbers": chosen.tolist(),
        "seconds": np.round(timestamps[chosen], 3).tolist(),
        "steps": (chosen * steps // len(frames)).tolist(),
    }
    text = json.dumps(data).replace("<", "\\u003c")  # a title must not end the script
    write_atomically(path, _TEMPLATE.read_text("utf-8").replace("__DATA__", text))


def _picture(frame: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
