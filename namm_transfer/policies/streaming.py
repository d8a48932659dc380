"""Sinks and recent tokens (StreamingLLM; Xiao et al., "Efficient Streaming Language Models with Attention Sinks")."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from namm_transfer.scoring import LayerView, Policy, check_count

__all__ = ["Streaming"]


@dataclass(frozen=True, kw_only=True)
class Streaming(Policy):
    """Keep the first ``sinks`` tokens of the sequence and the newest ones."""

    name: ClassVar[str] = "streaming"
    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("streaming: sinks", self.sinks, 0)

    def scores(self, view: LayerView) -> Tensor:
        position = view.tokens["positions"]
        return position.float().masked_fill(position < self.sinks, math.inf)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"sinks": self.sinks}
