"""The attention function that transformers calls: it hands the call to the memory that expects it.

Shape legend: B batch rows, H query heads, K KV heads, Q new queries, D key width, V value width.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from namm_transfer.errors import UnsupportedModelError
from namm_transfer.masks import AttentionMask, make_mask
from namm_transfer.tiles import AttentionOptions, attend

__all__ = ["NAME", "AttentionOptions", "Memory", "expecting", "namm_attention", "namm_mask", "register"]

NAME = "namm"
"""The implementation's name: ``model.set_attn_implementation("namm")``."""


class Memory(Protocol):
    """Something that answers an attention call in place of plain attention."""

    def expects(self, module: nn.Module, key: Tensor) -> bool:
        """Whether this call is meant for the memory."""
        ...

    def new_call(self) -> Memory | None:
        """Who expects the attention calls of a model that has just begun: this memory, or another, or none."""
        ...

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: AttentionOptions
    ) -> Tensor:
        """The call's output, [B, H, Q, V]."""
        ...


expecting: ContextVar[Memory | None] = ContextVar("namm_transfer_expecting", default=None)
"""The memory of the layer whose attention call comes next (a cache's update precedes it at once), or of an encoder."""


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


def namm_mask(*args: Any, **request: Any) -> AttentionMask:
    """The mask function registered as ``namm``. A model makes its masks before its first layer."""
    memory = expecting.get()
    if memory is not None:
        expecting.set(memory.new_call())
    return make_mask(*args, **request)


def register() -> None:
    """Make the implementation known to transformers; models that do not ask for it are untouched."""
    AttentionInterface.register(NAME, namm_attention)
    AttentionMaskInterface.register(NAME, namm_mask)
