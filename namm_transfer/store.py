"""Where tokens live: every head of every row keeps its own number of tokens.

What is wide (keys and values) is stored ragged: a head pays for its own tokens. What is narrow (positions, the policy's
state) is stored padded to the fullest head, so that policies work on plain tensors. The layout "padded" stores all of
it so; it is the simple reference.

Shape legend: B batch rows, K KV heads, C capacity, N tokens in use by the fullest head, n new tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from namm_transfer import kernels
from namm_transfer.ragged import Ragged

__all__ = ["Fields", "Layout", "TokenStore"]

GROWTH = 1.25
"""A full store grows by this factor, so that appending token by token copies each token a bounded number of times."""
SLACK = 64
"""Free places a store always takes along when it is reallocated, in tokens."""
WIDE = ("keys", "values")

Fields = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Name -> trailing shape and type of what is held of each token."""
Layout = Literal["ragged", "padded"]


class TokenStore:
    """Fields of tokens, oldest first, packed to the left; ``lengths`` [B, K] of them are in use.

    Attributes:
        fields: name -> [B, K, C, ...]; all share B, K and C.
        flat: the ragged fields; None in the padded layout.
        lengths: [B, K] int64 tokens in use.
        width: N, the largest length (kept beside the tensor so that reading it costs no synchronisation).
        even: every head of every row holds exactly ``width`` tokens.
    """

    def __init__(
        self, fields: dict[str, Tensor], lengths: Tensor, width: int, even: bool, flat: Ragged | None = None
    ) -> None:
        self.fields = fields
        self.flat = flat
        self.lengths = lengths
        self.width = width
        self.even = even
        self._free = 0
        """Places of the ragged fields that every head has left."""
        self._evicted = False
        """Places may have become free since the last trim."""

    @classmethod
    def empty(
        cls, rows: int, heads: int, fields: Fields, device: torch.device, layout: Layout = "ragged"
    ) -> TokenStore:
        """A store without tokens; ``fields`` gives each name its trailing shape and type."""
        made = {
            k: torch.empty((rows, heads, 0, *shape), dtype=dtype, device=device) for k, (shape, dtype) in fields.items()
        }
        return cls.from_padded(made, torch.zeros(rows, heads, dtype=torch.int64, device=device), layout)

    @classmethod
    def from_padded(cls, fields: dict[str, Tensor], lengths: Tensor, layout: Layout = "ragged") -> TokenStore:
        """A store of the first ``lengths`` [B, K] tokens of fields [B, K, N, ...]."""
        wide = {k: v for k, v in fields.items() if k in WIDE} if layout == "ragged" else {}
        flat = Ragged.from_padded(wide, lengths, 0) if wide else None
        store = cls({k: v for k, v in fields.items() if k not in wide}, lengths, 0, True, flat)
        store.recount()
        return store

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.fields.items()
        if self.flat is not None:
            yield from self.flat.fields.items()

    def __getitem__(self, name: str) -> Tensor:
        """The places in use of one field, [B, K, N, ...].

        Writing into it writes into the store, unless the field is ragged: then this is a copy.
        """
        if self.flat is not None and name in self.flat.fields:
            return self.flat.padded(name, self.width)
        return self.fields[name][:, :, : self.width]

    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys [T, D] and values [T, V] as they lie, and where each head's tokens start, [B, K]: no copy."""
        if self.flat is not None:
            return self.flat.fields["keys"], self.flat.fields["values"], self.flat.starts
        heads = torch.arange(self.lengths.numel(), device=self.lengths.device).view(self.lengths.shape)
        return self.fields["keys"].flatten(0, 2), self.fields["values"].flatten(0, 2), heads * self.capacity

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
        flat = None if self.flat is None else self.flat.rows(start, stop)
        fields = {k: v[start:stop] for k, v in self.fields.items()}
        part = TokenStore(fields, self.lengths[start:stop], self.width, self.even, flat)
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
        if self.flat is not None:
            self._free = int((self.flat.room - self.lengths).min())

    def reserve(self, count: int, *, exact: bool = False) -> None:
        """Reallocate if any head lacks places for ``count`` more tokens; with ``exact``, without places to spare."""
        needed = self.width + count
        if needed > self.capacity:
            self._resize(needed if exact else max(needed + SLACK, int(self.capacity * GROWTH)))
        if self.flat is not None and count > self._free:
            room = self.lengths + count
            self.flat.resize(self.lengths, room if exact else (room * GROWTH).long() + SLACK)
            self._free = int((self.flat.room - self.lengths).min())

    def _resize(self, capacity: int) -> None:
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
        if self.flat is not None:
            numbers = self.lengths.unsqueeze(-1) + torch.arange(count, device=self.lengths.device)
            for name in self.flat.fields:
                self.flat.write(name, numbers, new[name])
            self._free -= count
        if self.even:
            for name, field in self.fields.items():
                place = field[:, :, self.width : end]
                place.copy_(new[name]) if name in new else place.zero_()
        else:
            self._scatter(new, self.lengths.unsqueeze(-1) + torch.arange(count, device=self.lengths.device))
        self.lengths += count
        self.width = end

    def append_some(self, keys: Tensor, values: Tensor, seen: list[int], moving: list[bool]) -> None:
        """Add n tokens to every head of the rows that are ``moving``, to row r at the positions from ``seen[r]`` on.

        ``keys`` and ``values`` are [B, K, n, ...]; other fields start at zero. The places must have been reserved.
        """
        if (compiled := self._compiled()) is not None:
            self._append_compiled(*compiled, keys, values, seen, moving)
            return
        count, device = keys.shape[2], self.lengths.device
        steps = torch.arange(count, device=device)
        # the same for all rows needs no copy to the device, which would wait for it
        begin = seen[0] if len(set(seen)) == 1 else torch.tensor(seen, device=device).view(-1, 1, 1)
        positions = (begin + steps).expand(*keys.shape[:3])
        new = {"keys": keys, "values": values, "positions": positions}
        if all(moving):
            self.append(new)
            return
        numbers = self.lengths.unsqueeze(-1) + steps
        if self.flat is not None:
            for name in self.flat.fields:
                self.flat.write(name, numbers, new[name])
        # the first free places are written in every row, and counted in those that get tokens
        self._scatter(new, numbers)
        self.lengths += count * torch.tensor(moving, device=device).unsqueeze(1)
        self.recount()

    def _append_compiled(
        self, kernel: Any, flat: Ragged, keys: Tensor, values: Tensor, seen: list[int], moving: list[bool]
    ) -> None:
        held_keys, held_values = (flat.fields[name] for name in WIDE)
        keys, values = keys.to(held_keys.dtype), values.to(held_values.dtype)
        extent = kernel.append_(
            held_keys,
            held_values,
            flat.starts,
            flat.room,
            self.lengths,
            self.fields["positions"],
            [field for name, field in self.fields.items() if name != "positions"],
            keys if keys.stride(-1) == 1 else keys.contiguous(),
            values if values.stride(-1) == 1 else values.contiguous(),
            seen,
            moving,
        )
        self._note(extent)

    def _scatter(self, new: dict[str, Tensor], numbers: Tensor) -> None:
        """Put tokens at the heads' places ``numbers`` [B, K, n] of the padded fields; zero in fields not named."""
        for name, field in self.fields.items():
            where = numbers.view(*numbers.shape, *[1] * (field.ndim - 3)).expand(*numbers.shape, *field.shape[3:])
            if name in new:
                field.scatter_(2, where, new[name].to(field.dtype))
            else:
                field.scatter_(2, where, 0)

    def keep(self, mask: Tensor) -> None:
        """Forget every token outside ``mask`` [B, K, N]; the order of the others stays."""
        self._evicted = True
        if (compiled := self._compiled()) is not None:
            kernel, flat = compiled
            keys, values = (flat.fields[name] for name in WIDE)
            mask = mask.bool().expand(*self.lengths.shape, self.width)
            fields = list(self.fields.values())
            self._note(kernel.keep_(keys, values, flat.starts, flat.room, self.lengths, fields, mask))
            return
        mask = mask & self.valid()
        counts = mask.sum(-1)
        width = int(counts.max())
        order = torch.argsort(~mask, dim=-1, stable=True)[..., :width]  # [B, K, width], kept ones first
        for name in self.fields:
            field = self.fields[name]
            where = order.view(*order.shape, *[1] * (field.ndim - 3)).expand(*order.shape, *field.shape[3:])
            field[:, :, :width] = field.gather(2, where)
        if self.flat is not None:
            self.flat.keep(order, counts)
            self._free = int((self.flat.room - counts).min())
        self.lengths.copy_(counts)
        self.width = width
        self.even = bool((counts == width).all())

    def _compiled(self) -> tuple[Any, Ragged] | None:
        """The compiled kernel and what it works on, where they serve."""
        kernel = kernels.cpu() if self.lengths.device.type == "cpu" else None
        return None if kernel is None or self.flat is None else (kernel, self.flat)

    def _note(self, extent: tuple[int, int, int]) -> None:
        """Take note of what the kernel tells of the lengths: the largest, the smallest, and the fewest free places."""
        self.width, fewest, self._free = extent
        self.even = fewest == self.width

    def trim(self, *, settled: bool) -> None:
        """Give back free places: all but a few, or, unless ``settled`` (tokens come singly), what is beyond growth."""
        if not (settled or self._evicted):
            return
        self._evicted = False
        most = self.width + 2 * SLACK
        if self.capacity > (most if settled else max(self.width * GROWTH, most)):
            self._resize(self.width + SLACK)
        if self.flat is not None:
            used, held = int(self.lengths.sum()), int(self.flat.room.sum())
            most = used + 2 * SLACK * self.lengths.numel()
            if held > (most if settled else GROWTH * most):
                self.flat.resize(self.lengths, self.lengths + SLACK)
                self._free = SLACK

    def select(self, index: Tensor) -> TokenStore:
        """A copy with the rows ``index`` [B'] (may repeat)."""
        index = index.to(self.lengths.device)
        fields = {k: v[:, :, : self.width].index_select(0, index) for k, v in self.fields.items()}
        lengths = self.lengths.index_select(0, index)
        flat = None if self.flat is None else self.flat.select(index, lengths, SLACK)
        chosen = TokenStore(fields, lengths, self.width, self.even, flat)
        chosen.recount()
        return chosen

    def to(self, device: torch.device | str) -> TokenStore:
        """The store on another device."""
        flat, moved = self.flat, {k: v.to(device) for k, v in self.fields.items()}
        if flat is not None:
            flat = Ragged(
                {k: v.to(device) for k, v in flat.fields.items()}, flat.starts.to(device), flat.room.to(device)
            )
        store = TokenStore(moved, self.lengths.to(device), self.width, self.even, flat)
        store._free = self._free
        return store

    def bytes(self, names: tuple[str, ...] | None = None) -> int:
        """Bytes really allocated by the named fields (by default all of them, and the lengths)."""
        chosen = [v for k, v in self if names is None or k in names]
        if names is None:
            chosen += [self.lengths] if self.flat is None else [self.lengths, self.flat.starts, self.flat.room]
        return sum(v.untyped_storage().nbytes() for v in chosen)
