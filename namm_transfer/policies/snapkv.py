"""The last window's attention, pooled (SnapKV; Li et al., "LLM Knows What You are Looking for Before Generation")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from namm_transfer.errors import ConfigError
from namm_transfer.scoring import Fields, LayerView, Policy, check_count, recent
from namm_transfer.tiles import Observed

__all__ = ["SnapKV"]


@dataclass(frozen=True, kw_only=True)
class SnapKV(Policy):
    """Keep the last ``window`` tokens, and of the older ones those that the window's queries attend to.

    Attributes:
        window: queries before each decision whose attention counts; at most the update interval.
        kernel: places over which the older tokens' attention is averaged, so that neighbours stay together (odd).
    """

    name: ClassVar[str] = "snapkv"
    observes: ClassVar[bool] = True
    window: int = 32
    kernel: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("snapkv: window", self.window, 1)
        check_count("snapkv: kernel", self.kernel, 1)
        if self.kernel % 2 == 0:
            raise ConfigError(f"snapkv: kernel must be odd; got {self.kernel}")

    def fields(self, dtype: torch.dtype) -> Fields:
        return {"windowed": ((), torch.float32)}

    def observe(self, view: LayerView, attn: Observed) -> None:
        # a tile lies within one interval
        phase = view.queries % view.interval
        if phase == 0:  # what the last interval left is out of date
            view.tokens["windowed"].zero_()
        first = view.interval - min(self.window, view.interval)
        start = max(first - phase, 0)
        if start < attn.count:
            view.tokens["windowed"].add_(attn.sums(start))

    def scores(self, view: LayerView) -> Tensor:
        window = min(self.window, view.interval)
        older = view.tokens["windowed"].masked_fill((view.age() < window), 0.0)
        pooled = F.avg_pool1d(older, self.kernel, stride=1, padding=self.kernel // 2)
        return recent(view, pooled, window)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"window": self.window, "kernel": self.kernel}
