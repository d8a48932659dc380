"""The policies: whatever scores the tokens of a memory and evicts. One method, one file."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

from namm_transfer.errors import ConfigError
from namm_transfer.policies.full import Full
from namm_transfer.policies.h2o import H2O
from namm_transfer.policies.key_norm import KeyNorm
from namm_transfer.policies.namm import FeatureStatistics, NAMMPolicy
from namm_transfer.policies.random import Random
from namm_transfer.policies.snapkv import SnapKV
from namm_transfer.policies.streaming import Streaming
from namm_transfer.policies.tova import TOVA
from namm_transfer.scoring import LayerView, Policy

__all__ = ["FeatureStatistics", "LayerView", "NAMMPolicy", "Policy", "names", "policy"]

_POLICIES: dict[str, type[Policy]] = {
    cls.name: cls for cls in (Full, NAMMPolicy, Random, Streaming, H2O, KeyNorm, TOVA, SnapKV)
}


def names() -> tuple[str, ...]:
    """The names that :func:`policy` knows."""
    return tuple(_POLICIES)


def policy(name: str, **options: Any) -> Policy:
    """Make a policy by name.

    Args:
        name: one of :func:`names`.
        options: its settings, e.g. ``budget=0.5`` (float: fraction of the tokens seen; int: tokens) or
            ``namm=NAMM.from_pretrained("default")``.

    Raises:
        ConfigError: an unknown name or option (the nearest valid one is named), or a value out of range.
    """
    cls = _POLICIES.get(name) if isinstance(name, str) else None
    if cls is None:
        raise ConfigError(f"unknown policy {name!r}{_nearest(str(name), _POLICIES)}; known are {', '.join(_POLICIES)}")
    known = [f.name for f in fields(cls)]
    for option in options:
        if option not in known:
            raise ConfigError(
                f"policy {name!r} has no option {option!r}{_nearest(option, known)}; it has {', '.join(known)}"
            )
    if "namm" in known and "namm" not in options:
        raise ConfigError("policy 'namm' needs namm=NAMM, e.g. NAMM.from_pretrained('default')")
    return cls(**options)


def _nearest(given: str, known: Any) -> str:
    close = difflib.get_close_matches(given, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
