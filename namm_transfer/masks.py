"""Masks as functions: who may attend to whom is asked for the retained tokens only, at their original positions.

A model that runs the ``namm`` attention gets an :class:`AttentionMask` where other implementations get a
tensor: no Q x N matrix is built until a tile of it is needed.

Shape legend: B batch rows, R rows of a run, K KV heads, Q new queries, t queries of a tile, N tokens, S tokens seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

from namm_transfer.errors import CacheError, UnsupportedModelError
from namm_transfer.store import TokenStore
from namm_transfer.tiles import Visible

__all__ = ["AttentionMask", "RunMask", "from_tensor", "make_mask", "take"]

MaskFunction = Callable[[Any, Any, Any, Any], Any]


class AttentionMask:
    """What transformers' mask creation asked for, unevaluated.

    Attributes:
        function: (row, head, query index, key index) -> may attend, for broadcast index tensors.
        padding: [B, S] bool, False for padding; None if there is none.
        covers: S, the tokens that the caller's attention_mask speaks of; None if there was no such mask.
        causal: the function is plain causality.
    """

    def __init__(
        self, function: MaskFunction, padding: Tensor | None = None, *, vmap: bool = False, **request: Any
    ) -> None:
        self.covers = None if padding is None else padding.shape[1]
        self.padding = None if padding is None or bool(padding.all()) else padding.bool()
        self.causal = function is causal_mask_function
        self.function = _vmapped(function) if vmap else function
        self._request = request | {"mask_function": function, "attention_mask": padding, "use_vmap": vmap}

    def allowed(self, rows: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Evaluate on a tile.

        Args:
            rows: [R] row numbers.
            query: [R, t] query indices, padding counted.
            key: [R, K, N] key indices, padding counted.

        Returns:
            [R, K, t, N] bool.
        """
        row = rows.view(-1, 1, 1, 1)
        head = torch.zeros_like(row)
        q, k = query[:, None, :, None], key[:, :, None, :]
        found = self.function(row, head, q, k)
        return torch.broadcast_to(found, torch.broadcast_shapes(q.shape, k.shape))

    # a composite model hands its mask to a text decoder that asks again: these make it pass for one that is ready
    ndim = 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[B, 1, Q, S], as of the tensor that it stands for."""
        return self._request["batch_size"], 1, self._request["q_length"], self._request["kv_length"]

    def tensor(self) -> Tensor | None:
        """The mask as transformers' sdpa implementation would get it, for a call without a memory."""
        return sdpa_mask(**self._request)


class RunMask:
    """A mask for the rows of a run, which are at the same point of their sequences; it speaks of positions.

    A token's position counts the tokens of its row, its index counts padding too: with left padding they differ.
    """

    def __init__(self, mask: AttentionMask, first: int, last: int, device: torch.device) -> None:
        self.mask = mask
        self.first = first
        self.last = last
        self.rows = torch.arange(first, last, device=device)
        self._padding = None if mask.padding is None else mask.padding[first:last]

    def _index(self, positions: Tensor) -> Tensor:
        """[R, M] positions -> indices."""
        if self._padding is None:
            return positions
        # tokens first, in their order: column i is the index of the token with position i
        places = torch.argsort(~self._padding, dim=-1, stable=True)
        return places.gather(1, positions)

    def ahead(self, end: int, left: int) -> int:
        """How many of the ``left`` tokens after a block that ends at position ``end`` its last query attends to.

        Only a bidirectional span (an image's tokens, a prefix) reaches ahead; spans are contiguous.
        """
        if self.mask.causal or left == 0:
            return 0
        positions = torch.arange(end - 1, end + left, device=self.rows.device).expand(len(self.rows), -1)
        index = self._index(positions)
        seen = self.mask.allowed(self.rows, index[:, :1], index[:, None, 1:])  # [R, 1, 1, left]
        return int(seen.cumprod(-1).sum(-1).max())

    def reaches_ahead(self, begin: int, end: int) -> bool:
        """Whether some query of the positions [begin, end) attends to a later one of them."""
        if self.mask.causal or end - begin < 2:
            return False
        index = self._index(torch.arange(begin, end, device=self.rows.device).expand(len(self.rows), -1))
        return bool(self.mask.allowed(self.rows, index, index[:, None]).triu(1).any())

    def visible(self, tokens: TokenStore, begin: int, end: int, ahead: int, start: int, stop: int) -> Visible:
        """For the queries [start, stop) of the block of positions [begin, end), which is in the store already.

        Returns:
            A tensor is [R, K, t, N + ahead].
        """
        if self.mask.causal:  # the block's tokens are the newest of every head
            return end - begin - 1 - start
        device = self.rows.device
        count = len(self.rows)
        query = self._index(torch.arange(begin + start, begin + stop, device=device).expand(count, -1))
        key, valid = self._keys(tokens)
        if ahead:
            later = self._index(torch.arange(end, end + ahead, device=device).expand(count, -1))[:, None]
            key = torch.cat([key, later.expand(-1, valid.shape[1], -1)], dim=-1)
            valid = torch.nn.functional.pad(valid, (0, ahead), value=True)
        return self.mask.allowed(self.rows, query, key) & valid.unsqueeze(2)

    def visible_newest(self, tokens: TokenStore, positions: Tensor) -> Visible:
        """For one query a row, at ``positions`` [R], whose token is the newest of its row; a tensor is [R, K, 1, N]."""
        if self.mask.causal:
            return None
        key, valid = self._keys(tokens)
        return self.mask.allowed(self.rows, self._index(positions.unsqueeze(1)), key) & valid.unsqueeze(2)

    def _keys(self, tokens: TokenStore) -> tuple[Tensor, Tensor]:
        """[R, K, N] the indices of the stored tokens, and which places hold one."""
        valid = tokens.valid()
        positions = tokens["positions"].long().masked_fill(~valid, 0)
        return self._index(positions.flatten(1)).view(valid.shape), valid


def take(x: Tensor, places: Tensor) -> Tensor:
    """The tokens at ``places`` [R, n] of x [R, H, Q, D]."""
    return x.gather(2, places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: Tensor | AttentionMask | None = None,
    use_vmap: bool = False,
    **request: Any,
) -> AttentionMask:
    """The mask function that goes with the ``namm`` attention (``AttentionMaskInterface``)."""
    if isinstance(attention_mask, AttentionMask):
        return attention_mask
    sizes = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length}
    return AttentionMask(mask_function, attention_mask, vmap=use_vmap, **sizes, **request)


def from_tensor(mask: Tensor, seen: list[int], total: int) -> AttentionMask:
    """A 4-D mask [B or 1, 1, Q, S] made by the caller: bool, or additive with 0 and a large negative number.

    Such a mask cannot tell padding from a token that others may not see, so it is taken for batches without padding.

    Args:
        seen: tokens seen by each row so far.
        total: the same with padding.

    Raises:
        UnsupportedModelError: the mask adds a bias, or differs between heads, or there is padding.
        CacheError: it does not cover the batch, or the tokens seen so far.
    """
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise UnsupportedModelError(f"expected a 4-D mask with one head [B, 1, Q, S]; got shape {tuple(mask.shape)}")
    if mask.shape[0] not in (1, len(seen)):
        raise CacheError(f"the 4-D mask has {mask.shape[0]} rows, but the batch has {len(seen)}")
    if mask.shape[3] < total + mask.shape[2]:
        raise CacheError(
            f"the 4-D mask covers {mask.shape[3]} keys, but {total} tokens were seen before these {mask.shape[2]}"
        )
    if mask.dtype != torch.bool:
        if not ((mask == 0) | (mask <= -1e4)).all():
            raise UnsupportedModelError("the 4-D mask adds a position bias; the namm attention takes only 0 and -inf")
        mask = mask == 0
    if any(count != total for count in seen):
        raise UnsupportedModelError(
            f"a 4-D mask came after padding (the rows have seen {seen} of {total} tokens), and it cannot tell which "
            "tokens are padding; pass attention_mask as [B, S], 0 for padding"
        )
    unseen = ~mask[:, 0].diagonal(total, 1, 2)  # a query's own token is hidden where the query is padding
    if unseen.any():
        raise UnsupportedModelError(
            f"{int(unseen.sum())} queries of the 4-D mask may not see their own token, as where there is padding; a "
            "memory that counts tokens needs attention_mask as [B, S], 0 for padding"
        )

    def function(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask[row.clamp(max=mask.shape[0] - 1), 0, query - total, key]

    return AttentionMask(function, batch_size=mask.shape[0], q_length=mask.shape[2], kv_length=mask.shape[3])


def _vmapped(function: MaskFunction) -> MaskFunction:
    """Custom overlays need not be written for broadcast indices: map them over scalars."""
    mapped = torch.vmap(function)

    def broadcast(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(row.shape, head.shape, query.shape, key.shape)
        return mapped(*(x.expand(shape).flatten() for x in (row, head, query, key))).view(shape)

    return broadcast
