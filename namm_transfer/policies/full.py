"""Keep everything: the host model as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from namm_transfer.errors import BudgetError
from namm_transfer.scoring import LayerView, Policy

__all__ = ["Full"]


@dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """No eviction; takes no budget."""

    name: ClassVar[str] = "full"
    evicts: ClassVar[bool] = False
    optional_budget: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.budget is not None:
            raise BudgetError(f"the policy 'full' keeps every token and takes no budget; got {self.budget!r}")
        super().__post_init__()

    def scores(self, view: LayerView) -> Tensor:
        return torch.zeros_like(view.tokens["positions"], dtype=torch.float32)
