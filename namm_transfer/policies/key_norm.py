"""Small keys (Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from namm_transfer.scoring import LayerView, Policy

__all__ = ["KeyNorm"]


@dataclass(frozen=True, kw_only=True)
class KeyNorm(Policy):
    """Keep the tokens whose keys have a small L2 norm: those are the ones attended to."""

    name: ClassVar[str] = "key_norm"

    def scores(self, view: LayerView) -> Tensor:
        return -view.tokens["keys"].float().norm(dim=-1)
