"""Attention columns as sound: the windowed spectrum of how much a token is attended to over time.

Shape legend: R rows of a run, K KV heads, N retained tokens, T frames, S = 16 T queries.

Source: Cetin et al., "An Evolved Universal Transformer Memory", section 3.2; DESIGN.md section 3, steps 2 to 4.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from namm_transfer import kernels

__all__ = ["BINS", "DECAY", "HOP", "WINDOW", "advance", "basis", "listen", "loaded", "state_scale", "stored"]

HOP = 16
"""Queries between two frames."""
WINDOW = 32
"""Queries in a frame: the previous hop and the present one."""
BINS = WINDOW // 2 + 1
"""Values of a one-sided spectrum."""
DECAY = 0.99**HOP
"""What a hop leaves of the moving average: gamma = 0.99 per query, applied once per frame."""


@cache
def _basis64() -> Tensor:
    n = torch.arange(WINDOW, dtype=torch.float64)
    window = 0.5 - 0.5 * torch.cos(2 * math.pi * n / WINDOW)  # periodic Hann
    angle = 2 * math.pi * torch.outer(torch.arange(BINS, dtype=torch.float64), n) / WINDOW
    return torch.cat([torch.cos(angle), -torch.sin(angle)]) * window


@cache
def basis(device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """The window and the one-sided DFT folded into one matrix, [HOP, 2 * 2 * BINS].

    A hop of 16 values times it gives what the hop adds to a frame as its first half, then as its second half; of
    each the real parts, then the imaginary ones.
    """
    first, second = _basis64().split(HOP, dim=1)
    return torch.cat([first, second]).T.contiguous().to(device=device, dtype=dtype)


def stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention or spectra as the state of a memory holds them: in float16 they are scaled into its range."""
    scale = state_scale(dtype)
    return x.to(dtype) if scale == 1.0 else (x * scale).to(dtype)


def loaded(x: Tensor) -> Tensor:
    """The float32 values of what :func:`stored` made; may be ``x`` itself."""
    scale = state_scale(x.dtype)
    return x.float() if scale == 1.0 else x.float() / scale


def state_scale(dtype: torch.dtype) -> float:
    """What values are multiplied with in a memory's state of this type."""
    # a magnitude is at most 16, and 64 Ki is where float16 ends; below, 6e-8 still has all of its 11 bits
    return 1024.0 if dtype == torch.float16 else 1.0


def advance(ema: Tensor, previous: Tensor, rows: Tensor) -> None:
    """Fold whole hops of attention rows into the moving average of the spectrum, in place.

    Args:
        ema: [R, K, N, BINS] the average so far, as :func:`stored`; zeros for a new token.
        previous: [R, K, N, HOP] the rows of the hop before, as :func:`stored`; zeros before the first hop.
        rows: [R, K, S, N] attention of S = T * HOP new queries over the tokens; zeros where a token did not exist.
    """
    kernel = kernels.cpu() if rows.device.type == "cpu" else None
    if kernel is not None:
        kernel.advance_(ema, previous, rows.contiguous(), DECAY, state_scale(ema.dtype))
        return
    columns = torch.cat([loaded(previous), rows.transpose(-1, -2)], dim=-1)  # [R, K, N, HOP + S]
    # a frame is two neighbouring hops, so each hop is transformed once, as a first and as a second half
    halves = columns.reshape(-1, HOP) @ basis(rows.device)  # [M, 2 * 2 * BINS]
    first, second = halves.view(*columns.shape[:-1], -1, 4 * BINS).split(2 * BINS, dim=-1)
    spectrum = first[..., :-1, :] + second[..., 1:, :]  # [R, K, N, T, 2 * BINS]
    magnitude = torch.hypot(spectrum[..., :BINS], spectrum[..., BINS:])
    count = magnitude.shape[-2]
    # E <- DECAY * E + (1 - DECAY) * |X_t|, unrolled over the T frames at once
    weights = DECAY ** torch.arange(count - 1, -1, -1, device=rows.device, dtype=torch.float32)
    folded = torch.einsum("...tf,t->...f", magnitude, weights * (1 - DECAY))
    ema.copy_(stored(DECAY**count * loaded(ema) + folded, ema.dtype))
    previous.copy_(stored(columns[..., -HOP:], previous.dtype))


def listen(
    ema: Tensor, previous: Tensor, waiting: Tensor, rows: Tensor, queries: list[int], moving: list[bool]
) -> bool:
    """Fold fewer than 16 attention rows, each of R sequences at its own point, into the moving average, in place.

    Args:
        ema, previous: as of :func:`advance`; N places or more.
        waiting: [R, K, N, HOP] the rows of each sequence's unfinished hop, as :func:`stored`; zeros to come.
        rows: [R, K, t, N] attention of the new queries.
        queries: R counts of the queries before these.
        moving: which of the R sequences make them.

    Returns:
        Whether it was done: only the compiled kernel can.
    """
    kernel = kernels.cpu() if rows.device.type == "cpu" else None
    if kernel is None:
        return False
    kernel.listen_(ema, previous, waiting, rows.contiguous(), queries, moving, DECAY, state_scale(ema.dtype))
    return True
