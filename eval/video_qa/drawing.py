"""Anti-aliased coloured shapes on a static textured background.

Shape letters: T frames, S side of the square frame in pixels.
"""

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 45, 45),
    "green": (50, 200, 70),
    "blue": (60, 90, 245),
    "yellow": (240, 225, 60),
    "cyan": (60, 220, 230),
    "magenta": (220, 60, 220),
    "orange": (245, 140, 35),
    "white": (240, 240, 240),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross", "diamond", "ring")


def background(rng: np.random.Generator, side: int) -> np.ndarray:
    """A dark, low-contrast texture, float32 [S, S, 3] in 0..255: what stays still in a clip."""
    base = rng.uniform(20.0, 55.0)
    blocks = rng.uniform(-12.0, 12.0, size=(8, 8, 1)) + rng.uniform(-5.0, 5.0, size=(1, 1, 3))
    scale = -(-side // 8)
    texture = np.repeat(np.repeat(blocks, scale, axis=0), scale, axis=1)[:side, :side]
    return np.clip(base + texture, 0.0, 255.0).astype(np.float32)


def coverage(shape: str, centres: np.ndarray, radius: float, side: int) -> np.ndarray:
    """How much of every pixel the shape covers, float32 [T, S, S] in 0..1.

    Args:
        shape: one of `SHAPES`.
        centres: float [T, 2], (x, y) in pixels; may lie outside the frame.
        radius: half the shape's width in pixels.
        side: S.

    Raises:
        KeyError: an unknown shape.
    """
    axis = np.arange(side, dtype=np.float32) + 0.5
    centres = np.asarray(centres, dtype=np.float32)
    dx = axis[None, None, :] - centres[:, 0, None, None]
    dy = axis[None, :, None] - centres[:, 1, None, None]
    return np.clip(0.5 - _DISTANCE[shape](dx, dy, np.float32(radius)), 0.0, 1.0)


def paint(frames: np.ndarray, alpha: np.ndarray, colour: tuple[int, int, int]) -> None:
    """Blend a colour into float frames [T, S, S, 3] in place, weighted by coverage [T, S, S]."""
    frames += alpha[..., None] * (np.asarray(colour, dtype=np.float32) - frames)


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Float frames in 0..255 to uint8, rounded."""
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)


def _circle(dx: np.ndarray, dy: np.ndarray, r: np.float32) -> np.ndarray:
    return np.hypot(dx, dy) - r


def _square(dx: np.ndarray, dy: np.ndarray, r: np.float32) -> np.ndarray:
    return np.maximum(np.abs(dx), np.abs(dy)) - 0.86 * r


def _triangle(dx: np.ndarray, dy: np.ndarray, r: np.float32) -> np.ndarray:
    # Apex up: two slanted sides and a base.
    slanted = (2.0 * np.abs(dx) - dy) / np.sqrt(5.0) - 0.45 * r
    return np.maximum(slanted, dy - 0.85 * r)


def _cross(dx: np.ndarray, dy: np.ndarray, r: np.float32) -> np.ndarray:
    ax, ay = np.abs(dx), np.abs(dy)
    bar = 0.33 * r
    return np.minimum(np.maximum(ax - r, ay - bar), np.maximum(ay - r, ax - bar))


def _diamond(dx: np.ndarray, dy: np.ndarray, r: np.float32) -> np.ndarray:
    # Narrower than it is tall, so that it is not a turned square.
    return (1.6 * np.abs(dx) + np.abs(dy)) / np.float32(np.hypot(1.6, 1.0)) - 0.6 * r


def _ring(dx: np.ndarray, dy: np.ndarray, r: np.float32) -> np.ndarray:
    return np.abs(np.hypot(dx, dy) - 0.78 * r) - 0.22 * r


_DISTANCE = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "diamond": _diamond,
    "ring": _ring,
}
