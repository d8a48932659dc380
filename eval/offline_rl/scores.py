"""Scores: a return means something only beside a random and a good policy's in the same environment.

`score_fraction` is 0 at the random policy's mean return and 1 at the good policy's; `score_percent` is that
times 100, D4RL's "normalised score". Environment versions change the rewards, so a reference belongs to one
version and is refused for any other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from namm_transfer.errors import DataError


@dataclass(frozen=True)
class ReturnSummary:
    """Returns of `n` episodes: mean and sample standard deviation (NaN below two), raw units."""

    mean: float
    std: float
    n: int


@dataclass(frozen=True)
class ReferenceReturns:
    """The two mean returns between which scores of one environment are measured.

    Raises:
        DataError: a value is not finite, or `good` does not exceed `random`.
    """

    env_id: str
    random: float
    good: float
    source: str

    def __post_init__(self) -> None:
        if not (math.isfinite(self.random) and math.isfinite(self.good) and self.good > self.random):
            raise DataError(
                f"references of {self.env_id} are {self.random} (random) and {self.good} (good); expected "
                "two finite returns, the good one above the random one"
            )


# D4RL's published minimum and maximum. They belong to the v2 data, made with rewards that gymnasium's v4
# environments keep; the v5 environments do not.
D4RL_REFERENCES: dict[str, ReferenceReturns] = {
    reference.env_id: reference
    for reference in (
        ReferenceReturns("Hopper-v4", -20.272305, 3234.3, "D4RL"),
        ReferenceReturns("HalfCheetah-v4", -280.178953, 12135.0, "D4RL"),
        ReferenceReturns("Walker2d-v4", 1.629008, 4592.3, "D4RL"),
    )
}


def d4rl_references(env_id: str) -> ReferenceReturns:
    """Return D4RL's references of a v4 environment.

    Raises:
        DataError: D4RL publishes none for `env_id` (every v5 environment included).
    """
    if env_id not in D4RL_REFERENCES:
        known = ", ".join(D4RL_REFERENCES)
        raise DataError(f"D4RL has no references for {env_id!r}; expected one of {known}")
    return D4RL_REFERENCES[env_id]


def score_fraction(return_raw: float, env_id: str, references: ReferenceReturns) -> float:
    """Return where a raw return lies between the random (0) and the good policy (1).

    Raises:
        DataError: the references belong to another environment or version.
    """
    if env_id != references.env_id:
        raise DataError(
            f"a return on {env_id!r} cannot be scored with {references.source} references, which are of "
            f"{references.env_id!r}: environment versions pay different rewards"
        )
    return (return_raw - references.random) / (references.good - references.random)


def score_percent(return_raw: float, env_id: str, references: ReferenceReturns) -> float:
    """Return 100 times `score_fraction`, D4RL's normalised score."""
    return 100.0 * score_fraction(return_raw, env_id, references)


def summarise_returns(returns_raw: Iterable[float]) -> ReturnSummary:
    """Return the mean, sample standard deviation and count of raw returns (NaN where undefined)."""
    values = np.array(list(returns_raw), np.float64)
    return ReturnSummary(
        mean=float(values.mean()) if len(values) else math.nan,
        std=float(values.std(ddof=1)) if len(values) > 1 else math.nan,
        n=len(values),
    )
