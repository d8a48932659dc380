"""The best of the tokens by their scores: of a head or of a layer's heads together, of all or of segments in turn.

Shape legend: R rows, K KV heads, N tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["best"]


def best(ranked: Tensor, count: int, *, segments: Tensor | None = None, together: bool = False) -> Tensor:
    """Choose the tokens with the highest scores; between equal ones the newer.

    Args:
        ranked: [R, K, N] scores, oldest token first; infinite ones come first and last, whatever their segment.
        count: how many of each head.
        segments: [R, K, N]: segments take turns, so that the best of each is chosen, then the second best of each, and
            so on.
        together: the heads compete for K times as many.

    Returns:
        [R, K, N] bool.
    """
    rows, heads, width = ranked.shape
    if together:
        ranked, count = _pooled(ranked), count * heads
        segments = None if segments is None else _pooled(segments)
    order = ranked.shape[-1] - 1 - torch.argsort(ranked.flip(-1), dim=-1, descending=True, stable=True)
    if segments is not None:
        order = _taking_turns(order, segments, ranked)
    chosen = torch.zeros_like(ranked, dtype=torch.bool).scatter_(2, order[..., :count], True)
    return chosen.view(rows, width, heads).transpose(1, 2) if together else chosen


def _pooled(x: Tensor) -> Tensor:
    """[R, K, N] -> [R, 1, N K], the heads' tokens of a place side by side."""
    return x.transpose(1, 2).flatten(1).unsqueeze(1)


def _taking_turns(order: Tensor, segments: Tensor, ranked: Tensor) -> Tensor:
    """Places, best first -> the best of each segment, then the second best of each, and so on."""
    score, own = ranked.gather(2, order), segments.gather(2, order)
    grouped = torch.argsort(own, dim=-1, stable=True)  # segment by segment, the best first
    own, rank = own.gather(2, grouped), torch.arange(own.shape[-1], device=own.device).expand_as(own)
    begins = torch.ones_like(own, dtype=torch.bool)
    begins[..., 1:] = own[..., 1:] != own[..., :-1]
    turns = rank - torch.where(begins, rank, 0).cummax(-1).values
    turns = torch.empty_like(turns).scatter_(2, grouped, turns)  # of the places in `order`
    turns = turns.masked_fill(score == math.inf, -1).masked_fill(score == -math.inf, own.shape[-1])
    return order.gather(2, torch.argsort(turns, dim=-1, stable=True))
