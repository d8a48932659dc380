"""Places for tokens where every head of every row has its own number of them, one after the other in flat tensors.

Shape legend: B batch rows, K KV heads, T places in all, N tokens of the fullest head, n tokens of each head.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Ragged"]


class Ragged:
    """Fields [T, width] of tokens; head (b, k) owns the places from ``starts[b, k]`` on, ``room[b, k]`` of them.

    How many of them are in use is known to the store that this is a part of.
    """

    def __init__(self, fields: dict[str, Tensor], starts: Tensor, room: Tensor) -> None:
        self.fields = fields
        self.starts = starts
        self.room = room

    @classmethod
    def from_padded(cls, fields: dict[str, Tensor], lengths: Tensor, spare: int) -> Ragged:
        """Take over the first ``lengths`` [B, K] tokens of fields [B, K, C, width]; each head gets ``spare`` more."""
        capacity = next(iter(fields.values())).shape[2]
        starts = torch.arange(lengths.numel(), device=lengths.device).view(lengths.shape) * capacity
        flat = cls({k: v.flatten(0, 2) for k, v in fields.items()}, starts, torch.full_like(lengths, capacity))
        flat.resize(lengths, lengths + spare)
        return flat

    def index(self, numbers: Tensor) -> Tensor:
        """[B, K, n] the places of the heads' tokens with these ``numbers`` [B, K, n] or [n]."""
        return self.starts.unsqueeze(-1) + numbers

    def write(self, name: str, numbers: Tensor, values: Tensor) -> None:
        """Put ``values`` [B, K, n, width] at the heads' places ``numbers`` [B, K, n]."""
        field = self.fields[name]
        field.index_copy_(0, self.index(numbers).flatten(), values.reshape(-1, field.shape[1]).to(field.dtype))

    def padded(self, name: str, width: int) -> Tensor:
        """[B, K, N = width, ...] a copy; what lies beyond a head's tokens means nothing, but is finite."""
        field = self.fields[name]
        places = self.index(torch.arange(width, device=self.starts.device)).clamp_max(max(len(field) - 1, 0))
        return field[places]

    def keep(self, order: Tensor, counts: Tensor) -> None:
        """Let each head's tokens with the first ``counts`` [B, K] numbers of ``order`` [B, K, N] move to its front."""
        ranks = torch.arange(order.shape[-1], device=order.device)
        chosen = ranks < counts.unsqueeze(-1)
        source, target = self.index(order)[chosen], self.index(ranks)[chosen]
        for field in self.fields.values():
            field.index_copy_(0, target, field.index_select(0, source))

    def resize(self, lengths: Tensor, room: Tensor) -> None:
        """Reallocate to ``room`` [B, K] places a head, of which ``lengths`` are in use."""
        ranks = torch.arange(int(lengths.max()) if lengths.numel() else 0, device=lengths.device)
        used = ranks < lengths.unsqueeze(-1)
        source = self.index(ranks)[used]
        self.room = room
        self.starts = (room.flatten().cumsum(0) - room.flatten()).view(room.shape)
        target, total = self.index(ranks)[used], int(room.sum())
        for name, old in self.fields.items():
            new = old.new_zeros(total, old.shape[1])
            self.fields[name] = new.index_copy_(0, target, old.index_select(0, source))

    def rows(self, start: int, stop: int) -> Ragged:
        """Rows [start, stop), sharing this one's memory until either is reallocated."""
        return Ragged(self.fields, self.starts[start:stop], self.room[start:stop])

    def select(self, index: Tensor, lengths: Tensor, spare: int) -> Ragged:
        """A copy with the rows ``index`` [B'] (may repeat), which use ``lengths`` [B', K] places."""
        chosen = Ragged(dict(self.fields), self.starts[index], self.room[index])
        chosen.resize(lengths, lengths + spare)
        return chosen
