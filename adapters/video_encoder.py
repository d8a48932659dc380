"""Bidirectional encoders whose attention dispatches through transformers: ViViT, VideoMAE, V-JEPA 2, and image ViTs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from namm_transfer.adapters.base import Host, use_namm_attention
from namm_transfer.attention import NAME
from namm_transfer.encoder import EncoderMemory
from namm_transfer.errors import CacheError
from namm_transfer.scoring import Policy
from namm_transfer.stats import MemoryStats

__all__ = ["EncoderHost", "VideoEncoderHost", "attention_modules", "special_tokens"]

_APART = {"decoder", "predictor", "pooler"}
"""Parts that work on other tokens than the video's (masked-token decoders, predictors, attentive poolers)."""


def special_tokens(model: nn.Module) -> int:
    """Tokens before the patches: class, distillation and register tokens, told by their parameters."""
    count = 0
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        if last in ("cls_token", "class_embedding", "dist_token", "distillation_token"):
            count += 1
        elif last in ("reg_token", "register_tokens"):
            count += parameter.shape[-2]
    return count


class EncoderHost(Host):
    """An encoder under a policy: every call streams its queries past a memory of all its keys and values.

    Args:
        model, policy, update_interval: as of every host.
        carried: a token that every head of a layer evicted is gone for the later layers (see `EncoderMemory`).
    """

    memory: EncoderMemory | None = None
    """The memory of the last call."""

    def __init__(
        self,
        model: nn.Module,
        policy: Policy,
        update_interval: int = Host.default_interval,
        *,
        carried: bool = False,
    ) -> None:
        super().__init__(model, policy, update_interval)
        self.carried = carried

    def modules(self) -> dict[nn.Module, int]:
        """The attention modules that get the memory, and the special tokens in front of each one's sequence."""
        raise NotImplementedError

    def new_memory(self) -> EncoderMemory:
        """An empty memory under the host's policy."""
        return EncoderMemory(self.policy, self.update_interval, self.modules(), carried=self.carried)

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """The model's own call, its self-attention under the policy.

        Raises:
            CacheError: no attention module asked the memory, or no decision fell within any layer's sequence: the
                policy would silently do nothing.
        """
        self.memory = self.new_memory()
        self.memory.batch = next((len(x) for x in (*args, *inputs.values()) if isinstance(x, Tensor)), None)
        with self.memory.listening():
            out = self.model(*args, **inputs)
        self.memory.check_used(self.model)
        return out

    def stats(self) -> MemoryStats:
        if self.memory is None:
            raise CacheError("no call yet: stats() tells of the memory of the last call")
        return self.memory.stats()


class VideoEncoderHost(EncoderHost):
    """An encoder of transformers; tokens are in temporal order (frame by frame), special tokens are read out last."""

    _before: str | None = None

    @staticmethod
    def misfit(model: nn.Module) -> str | None:
        if not isinstance(model, PreTrainedModel):
            return f"a transformers model; found {type(model).__module__}.{type(model).__name__}"
        if not hasattr(model.config, "patch_size") and not hasattr(model.config, "tubelet_size"):
            return f"a vision encoder (a config with patch_size or tubelet_size); found {type(model.config).__name__}"
        if not attention_modules(model):
            return "bidirectional self-attention modules that dispatch (is_causal = False); found none"
        return None

    def modules(self) -> dict[nn.Module, int]:
        prefix = special_tokens(self.model)
        return dict.fromkeys(attention_modules(self.model), prefix)

    def attach(self) -> None:
        self._before = self.model.config._attn_implementation
        use_namm_attention(self.model, NAME)

    def detach(self) -> None:
        if self._before is not None:
            use_namm_attention(self.model, self._before)
            self._before = None


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The bidirectional self-attention modules that work on the patches, in the order of the layers."""
    return [
        module
        for name, module in model.named_modules()
        if getattr(module, "is_causal", None) is False and not _APART & set(name.split("."))
    ]
