"""Where tokens live: ragged storage in which every head of every row keeps its own number of tokens.

Shape legend: B batch rows, K KV heads, C capacity, N tokens in use by the fullest head, n new tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

__all__ = ["Fields", "TokenStore"]

GROWTH = 1.25
"""A full store grows by this factor, so that appending token by token copies each token a bounded number of times."""
SLACK = 64
"""Free places a store always takes along when it is reallocated, in tokens."""


Fields = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Name -> trailing shape and type of what is held of each token."""


class TokenStore:
    """Fields [B, K, C, ...] of tokens, oldest first, packed to the left; ``lengths`` [B, K] of them are in use.

    Attributes:
        fields: name -> [B, K, C, ...]; all share B, K and C.
        lengths: [B, K] int64 tokens in use.
        width: N, the largest length (kept beside the tensor so that reading it costs no synchronisation).
        even: every head of every row holds exactly ``width`` tokens.
    """

    def __init__(self, fields: dict[str, Tensor], lengths: Tensor, width: int, even: bool) -> None:
        self.fields = fields
        self.lengths = lengths
        self.width = width
        self.even = even

    @classmethod
    def empty(cls, rows: int, heads: int, fields: Fields, device: torch.device) -> TokenStore:
        """A store without tokens; ``fields`` gives each name its trailing shape and type."""
        made = {
            k: torch.empty((rows, heads, 0, *shape), dtype=dtype, device=device) for k, (shape, dtype) in fields.items()
        }
        return cls(made, torch.zeros(rows, heads, dtype=torch.int64, device=device), 0, True)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.fields.items())

    def __getitem__(self, name: str) -> Tensor:
        """The places in use of one field, [B, K, N, ...]; writing into it writes into the store."""
        return self.fields[name][:, :, : self.width]

    def add_fields(self, fields: Fields) -> None:
        """Add those of the fields that are not there yet; every token's value is zero."""
        for name, (shape, dtype) in fields.items():
            if name not in self.fields:
                size = (*self.lengths.shape, self.capacity, *shape)
                self.fields[name] = torch.zeros(size, dtype=dtype, device=self.lengths.device)

    def drop_fields(self, names: Iterable[str]) -> None:
        """Forget those of the fields that are there."""
        for name in names:
            self.fields.pop(name, None)

    @property
    def capacity(self) -> int:
        """C, places per head."""
        return next(iter(self.fields.values())).shape[2]

    def valid(self) -> Tensor:
        """[B, K, N] bool: the place holds a token."""
        index = torch.arange(self.width, device=self.lengths.device)
        return index < self.lengths.unsqueeze(-1)

    def rows(self, start: int, stop: int, *, aligned: bool = False) -> TokenStore:
        """Rows [start, stop) as a store that shares this one's memory (until either is reallocated).

        With ``aligned`` it keeps this one's width, so that its columns are those of a tensor over all rows.
        """
        if start == 0 and stop == len(self.lengths):
            return self
        part = TokenStore({k: v[start:stop] for k, v in self}, self.lengths[start:stop], self.width, self.even)
        if not aligned:
            part.recount()
        return part

    def clear(self, rows: Tensor) -> None:
        """Forget every token of the rows [M]."""
        self.lengths[rows] = 0
        self.recount()

    def recount(self) -> None:
        """Take note of lengths that were changed through a store made by :meth:`rows`."""
        self.width = int(self.lengths.max())
        self.even = bool((self.lengths == self.width).all())

    def reserve(self, capacity: int, *, exact: bool = False) -> None:
        """Reallocate so that each head has at least ``capacity`` places."""
        if capacity <= self.capacity and not exact:
            return
        capacity = capacity if exact else max(capacity + SLACK, int(self.capacity * GROWTH))
        for name, old in self.fields.items():
            new = old.new_zeros((*old.shape[:2], capacity, *old.shape[3:]))
            new[:, :, : self.width] = old[:, :, : self.width]
            self.fields[name] = new

    def append(self, new: dict[str, Tensor]) -> None:
        """Add n tokens to every head; ``new`` gives each field [B, K, n, ...]; fields not named start at zero.

        The places must have been reserved: a store made by :meth:`rows` cannot grow.
        """
        count = next(iter(new.values())).shape[2]
        end = self.width + count
        if self.even:
            for name, field in self.fields.items():
                place = field[:, :, self.width : end]
                place.copy_(new[name]) if name in new else place.zero_()
        else:
            index = self.lengths.unsqueeze(-1) + torch.arange(count, device=self.lengths.device)  # [B, K, n]
            for name, field in self.fields.items():
                where = index.view(*index.shape, *[1] * (field.ndim - 3)).expand(*index.shape, *field.shape[3:])
                if name in new:
                    field.scatter_(2, where, new[name].to(field.dtype))
                else:
                    field.scatter_(2, where, 0)
        self.lengths += count
        self.width = end

    def append_one(self, new: dict[str, Tensor], rows: Tensor) -> None:
        """Add one token to every head of some rows; ``new`` gives each field [B, K, 1, ...], ``rows`` is [B] bool."""
        for name, field in self.fields.items():
            where = self.lengths.view(*self.lengths.shape, *[1] * (field.ndim - 2)).expand(-1, -1, 1, *field.shape[3:])
            # the first free place is written in every row, and counted in those that get a token
            if name in new:
                field.scatter_(2, where, new[name].to(field.dtype))
            else:
                field.scatter_(2, where, 0)
        self.lengths += rows.unsqueeze(1)
        self.recount()

    def keep(self, mask: Tensor) -> None:
        """Forget every token outside ``mask`` [B, K, N]; the order of the others stays."""
        mask = mask & self.valid()
        counts = mask.sum(-1)
        width = int(counts.max())
        order = torch.argsort(~mask, dim=-1, stable=True)[..., :width]  # [B, K, width], kept ones first
        for name in self.fields:
            field = self.fields[name]
            where = order.view(*order.shape, *[1] * (field.ndim - 3)).expand(*order.shape, *field.shape[3:])
            field[:, :, :width] = field.gather(2, where)
        self.lengths.copy_(counts)
        self.width = width
        self.even = bool((counts == width).all())

    def trim(self, *, settled: bool) -> None:
        """Give back free places: all but a few, or, unless ``settled`` (tokens come singly), what is beyond growth."""
        most = self.width + 2 * SLACK
        if self.capacity > (most if settled else max(self.width * GROWTH, most)):
            self.reserve(self.width + SLACK, exact=True)

    def select(self, index: Tensor) -> TokenStore:
        """A copy with the rows ``index`` [B'] (may repeat)."""
        index = index.to(self.lengths.device)
        fields = {k: v[:, :, : self.width].index_select(0, index) for k, v in self}
        chosen = TokenStore(fields, self.lengths.index_select(0, index), self.width, self.even)
        chosen.recount()
        return chosen

    def to(self, device: torch.device | str) -> TokenStore:
        """The store on another device."""
        return TokenStore({k: v.to(device) for k, v in self}, self.lengths.to(device), self.width, self.even)

    def bytes(self, names: tuple[str, ...] | None = None) -> int:
        """Bytes really allocated by the named fields (by default all of them, and the lengths)."""
        chosen = [v for k, v in self if names is None or k in names]
        extra = self.lengths.untyped_storage().nbytes() if names is None else 0
        return sum(v.untyped_storage().nbytes() for v in chosen) + extra
