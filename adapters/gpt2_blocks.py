"""A decision transformer's encoder over a few new tokens, without what Python does around each of its modules.

At three tokens a step, calling modules and preparing masks takes transformers longer than the blocks take to compute.
Here the same operations read the modules' parameters, which are looked up once.

Shape legend: B rows, Q new tokens, W hidden width.
"""

from __future__ import annotations

from itertools import repeat
from operator import contains, is_
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from transformers.masking_utils import causal_mask_function
from transformers.models.decision_transformer import modeling_decision_transformer as modeling
from transformers.pytorch_utils import Conv1D

from namm_transfer.attention import namm_attention
from namm_transfer.masks import AttentionMask
from namm_transfer.memory import MemoryCache

__all__ = ["Blocks"]

_FORWARDS: dict[type[nn.Module], Any] = {
    kind: kind.forward
    for kind in (
        modeling.DecisionTransformerGPT2Model,
        modeling.DecisionTransformerGPT2Block,
        modeling.DecisionTransformerGPT2Attention,
        modeling.DecisionTransformerGPT2MLP,
        nn.Dropout,
        nn.Embedding,
        nn.LayerNorm,
        Conv1D,
    )
}
"""The calls that are written out here, by kind of module."""


class _Block(NamedTuple):
    attention: Any
    norms: tuple[tuple[Any, ...], tuple[Any, ...]]
    """Arguments of layer_norm before the attention, and before the MLP."""
    projections: tuple[tuple[Tensor, Tensor], ...]
    """Bias and weight of c_attn, the attention's c_proj, c_fc, and the MLP's c_proj."""
    activation: nn.Module


class Blocks:
    """The encoder of a decision transformer, called without its modules."""

    def __init__(self, encoder: Any) -> None:
        """Of an encoder that :meth:`of` agrees to."""
        self._encoder = encoder
        self._blocks: list[_Block] = []
        for block in encoder.h:
            attn, mlp = block.attn, block.mlp
            projections = tuple((x.bias, x.weight) for x in (attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj))
            self._blocks.append(_Block(attn, (_norm(block.ln_1), _norm(block.ln_2)), projections, mlp.act))
        self._last_norm = _norm(encoder.ln_f)
        parts = [*encoder.modules()]
        self._dropouts = [part for part in parts if isinstance(part, nn.Dropout)]
        self._hooks = [torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks]
        self._hooks += [hooks for part in parts for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        self._vars = [vars(part) for part in parts]
        held = [
            (held, name, value)
            for part in parts
            for held in (part._modules, part._parameters)
            for name, value in held.items()
        ]
        self._held = tuple(zip(*held, strict=True))
        """Dicts of modules and of parameters, names in them, and what was there: `current` compares without a loop."""

    @classmethod
    def of(cls, encoder: Any) -> Self | None:
        """None unless all of the encoder's modules are those that transformers makes, each with its own call."""
        if type(encoder) is not modeling.DecisionTransformerGPT2Model or encoder.config.add_cross_attention:
            return None
        blocks: Any = encoder.h
        called: list[nn.Module] = [encoder, encoder.drop, encoder.wpe, encoder.ln_f]
        for block in blocks:
            called += [part for part in block.modules() if part is not block.mlp.act]
        if any(type(part).forward is not _FORWARDS.get(type(part)) for part in called):
            return None
        return cls(encoder)

    @property
    def current(self) -> bool:
        """Whether calling the encoder would compute the same, and nobody would notice that it is not called.

        No module or parameter has been exchanged, no module's call has been wrapped in its instance (as some libraries
        do) or has a hook, and no dropout is in force.
        """
        held, names, values = self._held
        return not (
            any(self._hooks)
            or any(map(contains, self._vars, repeat("forward")))
            or any(dropout.training for dropout in self._dropouts)
            or not all(map(is_, map(dict.get, held, names), values))
        )

    def last(self, embeds: Tensor, cache: MemoryCache, padding: Tensor | None) -> Tensor:
        """What the encoder makes of the last token, [B, W], every token at position 0.

        Args:
            embeds: [B, Q, W].
            cache: takes the new tokens in.
            padding: [B, Q] bool, False where a row has no such token; None if every row has all.
        """
        mask = AttentionMask(causal_mask_function, padding)
        rows, count, width = embeds.shape
        hidden = (embeds + self._encoder.wpe.weight[0]).view(-1, width)
        for index, (attention, norms, (qkv, out, up, down), activation) in enumerate(self._blocks):
            parts = torch.addmm(qkv[0], torch.layer_norm(hidden, *norms[0]), qkv[1])
            query, key, value = parts.view(rows, count, 3, -1, attention.head_dim).permute(2, 0, 3, 1, 4).unbind()
            key, value = cache.update(key, value, index)
            attended = namm_attention(attention, query, key, value, mask, attention.scaling)[0].view(-1, width)
            if index == len(self._blocks) - 1:  # of the other tokens, only keys and values are needed
                hidden, attended = hidden[count - 1 :: count], attended[count - 1 :: count]
            hidden += torch.addmm(out[0], attended, out[1])
            inner = activation(torch.addmm(up[0], torch.layer_norm(hidden, *norms[1]), up[1]))
            hidden += torch.addmm(down[0], inner, down[1])
        return torch.layer_norm(hidden, *self._last_norm)


def _norm(module: Any) -> tuple[Any, ...]:
    """The arguments of layer_norm behind its input."""
    return module.normalized_shape, module.weight, module.bias, module.eps
