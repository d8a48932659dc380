"""TimeSformer, whose attention modules neither dispatch nor call torch's attention."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from namm_transfer.adapters.video_encoder import EncoderHost
from namm_transfer.attention import AttentionOptions, expecting
from namm_transfer.encoder import EncoderMemory

__all__ = ["TimesformerHost"]

_PARTS = ("qkv", "num_heads", "scale", "attn_drop")


class TimesformerHost(EncoderHost):
    """Modules with a fused ``qkv`` projection whose output projection lies in another module.

    With divided attention a temporal module sees one patch over the frames (no special token), a spatial one a
    frame's patches behind the class token; with joint attention a module sees all of them.

    A decision falls within a sequence only where it is longer than the update interval. A clip mostly has no more
    frames than that, so the temporal modules then keep every token, whatever the budget. The statistics count these
    tokens as retained (`kept_fraction` lies above the budget); `kept_at_updates` and `updates_by_row` speak of the
    decisions that were taken, those of the spatial modules.
    """

    @staticmethod
    def misfit(model: nn.Module) -> str | None:
        if not _attention_modules(model):
            return f"attention modules with {', '.join(_PARTS)} and no 'proj' (as TimeSformer's); found none"
        return None

    def modules(self) -> dict[nn.Module, int]:
        return {m: 0 if "temporal_attention" in name.split(".") else 1 for name, m in _attention_modules(self.model)}

    def attach(self) -> None:
        self._patched = [module for _, module in _attention_modules(self.model)]
        for module in self._patched:
            module.forward = partial(self._forward, module)  # on the instance: the class stays as it is

    def detach(self) -> None:
        for module in self.__dict__.pop("_patched", []):
            module.__dict__.pop("forward", None)

    def _forward(self, module: Any, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor]:
        memory = expecting.get()
        if not isinstance(memory, EncoderMemory) or memory is not self.memory:  # a call of the model itself
            return type(module).forward(module, hidden_states, output_attentions)
        rows, count, width = hidden_states.shape
        qkv = module.qkv(hidden_states).view(rows, count, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        out = memory.attend(module, query, key, value, None, AttentionOptions(module.scale))
        return (out.transpose(1, 2).reshape(rows, count, width),)


def _attention_modules(model: nn.Module) -> list[tuple[str, Any]]:
    return [
        (name, m)
        for name, m in model.named_modules()
        if all(hasattr(m, part) for part in _PARTS) and not hasattr(m, "proj") and not hasattr(m, "fused_attn")
    ]
