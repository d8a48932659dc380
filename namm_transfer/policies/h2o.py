"""Heavy hitters (H2O; Zhang et al., "Heavy-Hitter Oracle for Efficient Generative Inference of LLMs")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from namm_transfer.scoring import Fields, LayerView, Policy, recent
from namm_transfer.tiles import Observed

__all__ = ["H2O"]


@dataclass(frozen=True, kw_only=True)
class H2O(Policy):
    """Half of the budget for the newest tokens, half for those with the most accumulated attention."""

    name: ClassVar[str] = "h2o"
    observes: ClassVar[bool] = True

    def fields(self, dtype: torch.dtype) -> Fields:
        return {"accumulated": ((), torch.float32)}

    def observe(self, view: LayerView, attn: Observed) -> None:
        view.tokens["accumulated"].add_(attn.sums())

    def scores(self, view: LayerView) -> Tensor:
        return recent(view, view.tokens["accumulated"], self.allowance(view) // 2)
