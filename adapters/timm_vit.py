"""timm's vision transformers, whose attention modules call torch's attention themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from namm_transfer.adapters.video_encoder import EncoderHost, special_tokens
from namm_transfer.attention import AttentionOptions
from namm_transfer.encoder import EncoderMemory
from namm_transfer.errors import UnsupportedModelError

__all__ = ["TimmHost"]


_PARTS = ("fused_attn", "num_heads", "qkv")


class TimmHost(EncoderHost):
    """A model with timm's attention inside, whoever wrote the class around it.

    Modules with ``fused_attn`` compute ``scaled_dot_product_attention``, which is answered here.

    No forward method is rewritten, so query norms, gates, rotary embeddings and whatever a variant adds around
    its attention stay the variant's own.
    """

    @staticmethod
    def misfit(model: nn.Module) -> str | None:
        if not _attention_modules(model):
            return f"attention modules with {', '.join(_PARTS)} (timm.layers.Attention and its kin); found none"
        return None

    def modules(self) -> dict[nn.Module, int]:
        found = dict.fromkeys(_attention_modules(self.model), special_tokens(self.model))
        for part in self.model.modules():  # the transformer may be a part of the model; an inner one has its own say
            prefix = getattr(part, "num_prefix_tokens", None)
            if prefix is not None and part not in found:
                found |= dict.fromkeys(_attention_modules(part), prefix)
        return found

    def attach(self) -> None:
        self._fused = [(module, module.fused_attn) for module in _attention_modules(self.model)]
        for module, _ in self._fused:
            module.fused_attn = True

    def detach(self) -> None:
        for module, fused in self.__dict__.pop("_fused", []):
            module.fused_attn = fused

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        mode = _Intercept(self)
        hooks = [m.register_forward_pre_hook(partial(mode.enter, m)) for m, _ in self.__dict__.get("_fused", [])]
        hooks += [m.register_forward_hook(mode.leave, always_call=True) for m, _ in self.__dict__.get("_fused", [])]
        try:
            with mode:
                return super().__call__(*args, **inputs)
        finally:
            for hook in hooks:
                hook.remove()


class _Intercept(TorchFunctionMode):
    """Gives a module's attention to the memory while that module's forward runs."""

    def __init__(self, host: TimmHost) -> None:
        super().__init__()
        self.host = host
        self.running: list[tuple[nn.Module, int]] = []

    def enter(self, module: nn.Module, _: nn.Module, args: tuple[Any, ...]) -> None:
        tokens: Tensor = args[0]  # [B, N, D], or [B, h, w, D]
        self.running.append((module, tokens[0].numel() // tokens.shape[-1]))

    def leave(self, *_: Any) -> None:
        self.running.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        memory = self.host.memory
        if func is F.scaled_dot_product_attention and self.running and memory is not None and _is_self(*args[:2]):
            module, tokens = self.running[-1]
            if args[0].shape[2] != tokens:
                raise UnsupportedModelError(
                    f"{type(module).__name__} was given {tokens} tokens and attends among {args[0].shape[2]} of "
                    "something else (as XCiT does among channels): there are no tokens to evict"
                )
            return _answer(memory, module, *args, **kwargs)
        return func(*args, **kwargs)


def _is_self(query: Tensor, key: Tensor) -> bool:
    # attention pooling asks with latent queries: it reads out, and is left alone
    return query.shape[2] == key.shape[2]


def _answer(
    memory: EncoderMemory,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if is_causal:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    return memory.attend(module, query, key, value, attn_mask, AttentionOptions(scale))


def _attention_modules(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if all(hasattr(m, part) for part in _PARTS)]
