"""What a memory holds, and what it costs.

Shape legend: B batch rows, K KV heads, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from namm_transfer.store import TokenStore

__all__ = ["MemoryStats", "measure"]

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class MemoryStats:
    """What a memory holds.

    Attributes:
        seen: tokens seen by each row, [B]; where layers see different numbers, those of the first layer.
        retained: tokens retained, [L, B, K].
        kept_fraction: retained / seen now, over all layers, rows and heads.
        kept_fraction_by_row: the same for each row, [B].
        kept_at_updates: retained / seen just after each decision, averaged over decisions; None before the first.
            A rule whose budget is this fraction has the same memory.
        kept_by_row: the same for each row, [B]; None for a row without a decision.
        updates: decisions taken per row, averaged over rows and layers.
        updates_by_row: decisions of each row, summed over its layers, [B]: the weight of its entry in ``kept_by_row``.
        bytes: really allocated, by use: "kv", "positions", "policy", "total".
    """

    seen: list[int]
    retained: Tensor
    kept_fraction: float
    kept_fraction_by_row: list[float]
    kept_at_updates: float | None
    kept_by_row: list[float | None]
    updates: float
    updates_by_row: list[int]
    bytes: dict[str, int]


def measure(
    stores: list[TokenStore],
    seen: list[list[int]],
    updates: list[list[int]],
    kept: list[list[float]],
    inputs: int | None = None,
) -> MemoryStats:
    """Sum up layers: their stores, and per layer and row the tokens seen, decisions, and summed kept fractions.

    ``inputs`` is B where layers have several rows for each input; by default a row is an input.
    """
    if not stores:
        nothing = dict.fromkeys(("kv", "positions", "policy", "total"), 0)
        return MemoryStats([], torch.zeros(0, 0, 0, dtype=torch.int64), 1.0, [], None, [], 0.0, [], nothing)
    inputs = inputs or len(seen[0])
    retained = torch.stack([x.lengths.cpu().unflatten(0, (inputs, -1)).sum(1) for x in stores])
    seen_by_layer = [_by_input(layer, inputs) for layer in seen]
    seen_by_row = _summed(seen_by_layer)
    updates_by_row = _summed([_by_input(layer, inputs) for layer in updates])
    summed_by_row = _summed([_by_input(layer, inputs) for layer in kept])
    retained_by_row = retained.sum((0, 2)).tolist()
    heads = retained.shape[2]
    size = {
        "kv": sum(x.bytes(("keys", "values")) for x in stores),
        "positions": sum(x.bytes(("positions",)) for x in stores),
        "total": sum(x.bytes() for x in stores),
    }
    size["policy"] = sum(x.bytes(tuple(k for k, _ in x if k not in ("keys", "values", "positions"))) for x in stores)
    return MemoryStats(
        seen=seen_by_layer[0],
        retained=retained,
        kept_fraction=sum(retained_by_row) / max(sum(seen_by_row) * heads, 1),
        kept_fraction_by_row=[n / max(s * heads, 1) for n, s in zip(retained_by_row, seen_by_row, strict=True)],
        kept_at_updates=_ratio(sum(summed_by_row), sum(updates_by_row)),
        kept_by_row=[_ratio(k, n) for k, n in zip(summed_by_row, updates_by_row, strict=True)],
        updates=sum(updates_by_row) / sum(len(layer) for layer in updates),
        updates_by_row=updates_by_row,
        bytes=size,
    )


def _by_input(values: list[Number], inputs: int) -> list[Number]:
    """Sum up the rows of each input."""
    each = len(values) // inputs
    return [sum(values[i * each : (i + 1) * each]) for i in range(inputs)]


def _summed(layers: list[list[Number]]) -> list[Number]:
    """Sum up layers, row by row."""
    return [sum(row) for row in zip(*layers, strict=True)]


def _ratio(kept: float, decisions: int) -> float | None:
    return kept / decisions if decisions else None
