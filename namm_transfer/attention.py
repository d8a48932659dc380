"""Tiled attention that can be watched, and the attention function that transformers calls.

Shape legend: R rows, H query heads, K KV heads, G = H / K, t queries of a tile, n queries of a block, N tokens,
D key width, V value width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from namm_transfer.errors import UnsupportedModelError
from namm_transfer.masks import AttentionMask, make_mask
from namm_transfer.spectrogram import HOP

__all__ = ["NAME", "AttentionOptions", "Memory", "attend", "expecting", "namm_attention", "register", "tiles"]

NAME = "namm"
"""The implementation's name: ``model.set_attn_implementation("namm")``."""
TILE_BYTES = 32 * 2**20
"""Bound on the float32 attention probabilities that exist at a time."""

Observer = Callable[[Tensor], None]


class AttentionOptions:
    """The numbers that a model's attention call carries beside its tensors."""

    def __init__(self, scaling: float | None = None, softcap: float | None = None, sinks: Tensor | None = None) -> None:
        self.scaling = scaling
        self.softcap = softcap
        self.sinks = sinks

    @property
    def plain(self) -> bool:
        """Neither a cap on the logits nor learned sinks: torch's own kernels compute it."""
        return self.softcap is None and self.sinks is None


class Memory(Protocol):
    """Something that answers an attention call in place of plain attention."""

    def expects(self, module: nn.Module, key: Tensor) -> bool:
        """Whether this call is meant for the memory."""
        ...

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: AttentionOptions
    ) -> Tensor:
        """The call's output, [B, H, Q, V]."""
        ...


expecting: ContextVar[Memory | None] = ContextVar("namm_transfer_expecting", default=None)
"""The memory of the layer whose attention call comes next (a cache's update precedes it at once), or of an encoder."""


def tiles(count: int, phase: int, cost: int) -> Iterator[tuple[int, int]]:
    """Cut ``count`` queries into tiles that end with hops wherever they can.

    Args:
        count: n.
        phase: queries of an unfinished hop before the first one, in [0, 16).
        cost: bytes of probabilities per query.
    """
    limit = max(1, TILE_BYTES // max(cost, 1) // HOP) * HOP
    start = 0
    if phase:
        stop = min(HOP - phase, count)
        yield 0, stop
        start = stop
    whole = start + (count - start) // HOP * HOP
    while start < whole:
        stop = min(start + limit, whole)
        yield start, stop
        start = stop
    if start < count:
        yield start, count


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    options: AttentionOptions,
    observer: Observer | None,
) -> Tensor:
    """Attention of one tile.

    Args:
        query: [R, H, t, D].
        key, value: [R, K, N, D], [R, K, N, V].
        allowed: [R or 1, K or 1, t, N] bool, or None if every query sees every token.
        observer: gets the probabilities averaged in float32 over each group of query heads, [R, K, t, N].

    Returns:
        [R, H, t, V].
    """
    rows, heads, count, _ = query.shape
    kv_heads, width = key.shape[1:3]
    groups = heads // kv_heads
    if observer is None and options.plain:
        if allowed is not None and allowed.shape[1] not in (1, heads):
            allowed = allowed.repeat_interleave(groups, dim=1)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=allowed, scale=options.scaling, enable_gqa=groups > 1
        )
    scaling = query.shape[-1] ** -0.5 if options.scaling is None else options.scaling
    grouped = query.reshape(rows, kv_heads, groups * count, -1)
    logits = torch.matmul(grouped, key.transpose(-1, -2)).view(rows, kv_heads, groups, count, width).float() * scaling
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    if allowed is not None:
        logits = logits.masked_fill(~allowed.unsqueeze(2), float("-inf"))
    if options.sinks is not None:  # one more logit per head that takes probability and gives nothing
        sink = options.sinks.float().view(1, kv_heads, groups, 1, 1).expand(rows, -1, -1, count, 1)
        attn = torch.cat([logits, sink], dim=-1).softmax(-1)[..., :-1]
    else:
        attn = logits.softmax(-1)
    if observer is not None:
        observer(attn.mean(2))
    out = torch.matmul(attn.to(value.dtype).view(rows, kv_heads, groups * count, width), value)
    return out.view(rows, heads, count, -1)


def namm_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: AttentionMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function registered as ``namm``: hands the call to the memory that expects it.

    Without a memory (no cache given, another cache, cross-attention) it is plain attention.

    Args:
        query: [B, H, Q, D].
        key, value: [B, K, Q, D], as returned by the cache's update.
        attention_mask: as made by the mask function of the same name.

    Returns:
        [B, Q, H, V], and no attention weights.

    Raises:
        UnsupportedModelError: the call carries something that a memory cannot honour.
    """
    if kwargs.get("position_bias") is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} adds a position bias, which the namm attention does not take"
        )
    options = AttentionOptions(scaling, softcap, s_aux)
    memory = expecting.get()
    if memory is not None and memory.expects(module, key):
        return memory.attend(module, query, key, value, attention_mask, options).transpose(1, 2).contiguous(), None
    mask = attention_mask.tensor() if isinstance(attention_mask, AttentionMask) else attention_mask
    if options.plain:
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    if mask is None:
        mask = query.new_ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
    elif mask.dtype != torch.bool:
        mask = mask == 0
    return attend(query, key, value, mask, options, None).transpose(1, 2).contiguous(), None


def register() -> None:
    """Make the implementation known to transformers; models that do not ask for it are untouched."""
    AttentionInterface.register(NAME, namm_attention)
    AttentionMaskInterface.register(NAME, make_mask)
