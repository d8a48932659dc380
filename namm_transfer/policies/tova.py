"""The newest query's attention (TOVA; Oren et al., "Transformers are Multi-State RNNs")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from namm_transfer.scoring import Fields, LayerView, Policy
from namm_transfer.tiles import Observed

__all__ = ["TOVA"]


@dataclass(frozen=True, kw_only=True)
class TOVA(Policy):
    """Keep what the last query before the decision attends to, averaged over all heads of the layer.

    All heads of a layer keep the same tokens, as published.
    """

    name: ClassVar[str] = "tova"
    observes: ClassVar[bool] = True

    def fields(self, dtype: torch.dtype) -> Fields:
        return {"last": ((), torch.float32)}

    def observe(self, view: LayerView, attn: Observed) -> None:
        view.tokens["last"].copy_(attn.sums(attn.count - 1))

    def scores(self, view: LayerView) -> Tensor:
        last = view.tokens["last"]
        return last.mean(1, keepdim=True).expand_as(last)
