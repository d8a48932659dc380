"""Keep a random subset: the control that knows nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from namm_transfer.scoring import LayerView, Policy, check_count

__all__ = ["Random"]

_PRIME = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Random(Policy):
    """Each token of each head has one random score for life, so what is kept is uniform over the tokens seen.

    The score is a hash of seed, layer, head and position: no generator whose state a batch, a split of the
    prompt or a resumed run could change.
    """

    name: ClassVar[str] = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("random: seed", self.seed, 0)

    def scores(self, view: LayerView) -> Tensor:
        position = view.tokens["positions"].long()
        head = torch.arange(position.shape[1], device=position.device).view(1, -1, 1)
        x = (position * 1_000_003 + head * 8_191 + view.layer * 131_071 + self.seed * 524_287 + 12_345) % _PRIME
        for multiplier in (48_271, 69_621, 16_807):  # products stay below 2**63
            x = (x ^ (x >> 15)) * multiplier % _PRIME
        return x.double().div(_PRIME).float()

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"seed": self.seed}
