"""Neural attention memory models for any transformer.

A NAMM looks only at attention values and decides which tokens of a transformer's key/value cache to evict.
Evolved on language alone, it can be frozen and laid over video models and decision transformers, zero-shot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from namm_transfer.attention import register as _register
from namm_transfer.memory import MemoryCache
from namm_transfer.network import NAMM
from namm_transfer.policies import policy
from namm_transfer.stats import MemoryStats

if TYPE_CHECKING:
    from namm_transfer.adapters import adapt

__all__ = ["NAMM", "MemoryCache", "MemoryStats", "adapt", "policy"]
__version__ = "0.1.0"

_register()  # makes the name "namm" known to transformers; no model changes until it asks for it


def __getattr__(name: str) -> Any:
    # the adapters build on this package, so they are imported when first asked for
    if name == "adapt":
        from namm_transfer.adapters import adapt

        return adapt
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
