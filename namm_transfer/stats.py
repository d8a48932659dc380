"""What a memory holds, and what it costs.

Shape legend: B batch rows, K KV heads, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from namm_transfer.store import TokenStore

__all__ = ["MemoryStats", "measure"]


@dataclass(frozen=True)
class MemoryStats:
    """What a memory holds.

    Attributes:
        seen: tokens seen by each row, [B].
        retained: tokens retained, [L, B, K].
        kept_fraction: retained / seen now, over all layers, rows and heads.
        kept_at_updates: retained / seen just after each decision, averaged over decisions; 1.0 before the first.
            A rule whose budget is this fraction has the same memory.
        updates: decisions taken per row, averaged over rows and layers.
        bytes: really allocated, by use: "kv", "positions", "policy", "total".
    """

    seen: list[int]
    retained: Tensor
    kept_fraction: float
    kept_at_updates: float
    updates: float
    bytes: dict[str, int]

    def rows(self) -> list[float]:
        """The kept fraction of each row."""
        return [float(self.retained[:, i].float().mean()) / max(s, 1) for i, s in enumerate(self.seen)]


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
        return MemoryStats([], torch.zeros(0, 0, 0, dtype=torch.int64), 1.0, 1.0, 0.0, nothing)
    inputs = inputs or len(seen[0])
    retained = torch.stack([x.lengths.cpu().unflatten(0, (inputs, -1)).sum(1) for x in stores])
    decisions = [n for layer in updates for n in layer]
    total_seen = sum(n for layer in seen for n in layer) * retained.shape[2]
    totals = torch.tensor(seen[0]).unflatten(0, (inputs, -1)).sum(1).tolist()
    size = {
        "kv": sum(x.bytes(("keys", "values")) for x in stores),
        "positions": sum(x.bytes(("positions",)) for x in stores),
        "total": sum(x.bytes() for x in stores),
    }
    size["policy"] = sum(x.bytes(tuple(k for k, _ in x if k not in ("keys", "values", "positions"))) for x in stores)
    return MemoryStats(
        seen=totals,
        retained=retained,
        kept_fraction=int(retained.sum()) / max(total_seen, 1),
        kept_at_updates=sum(x for layer in kept for x in layer) / sum(decisions) if sum(decisions) else 1.0,
        updates=sum(decisions) / len(decisions),
        bytes=size,
    )
