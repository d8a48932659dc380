"""Means, paired differences and ratios with intervals that know units of one video or episode are not independent.

All three are one estimator, a ratio of totals, sum(a) / sum(b): a mean has b = 1, a paired difference
a = score - reference and b = 1, a normalised score b = reference. Its variance is the cluster-robust one
of the linearised ratio, with the small-sample factor G / (G - 1); the interval takes Student's t with
G - 1 degrees of freedom. For a mean this is the CR1 sandwich of a regression on a constant, and with
clusters of one unit the textbook t interval. Nothing here draws random numbers.

Shape letters: n units, G clusters.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

from namm_transfer.errors import DataError

__all__ = ["Estimate", "difference", "mean", "normalised", "ratio"]


@dataclass(frozen=True)
class Estimate:
    """A value and its interval; NaN wherever it is undefined (no units, one cluster, a zero denominator)."""

    value: float
    low: float
    high: float
    units: int
    clusters: int

    @property
    def half_width(self) -> float:
        """Half of the interval, the figure after ±."""
        return (self.high - self.low) / 2


def mean(values: Sequence[float], clusters: Sequence[Hashable], confidence: float = 0.95) -> Estimate:
    """Mean over units of `values` [n], interval clustered by `clusters` [n]."""
    return ratio(values, np.ones(len(values)), clusters, confidence)


def difference(
    values: Sequence[float], reference: Sequence[float], clusters: Sequence[Hashable], confidence: float = 0.95
) -> Estimate:
    """Mean of the paired differences values - reference, both [n] over the same units in the same order."""
    return ratio(np.subtract(values, reference), np.ones(len(values)), clusters, confidence)


def normalised(
    values: Sequence[float], reference: Sequence[float], clusters: Sequence[Hashable], confidence: float = 0.95
) -> Estimate:
    """Mean of `values` as a fraction of the mean of `reference`, paired; NaN unless that mean is positive."""
    if np.sum(reference) <= 0:
        return Estimate(math.nan, math.nan, math.nan, len(values), len(set(clusters)))
    return ratio(values, reference, clusters, confidence)


def ratio(
    numerator: Sequence[float] | np.ndarray,
    denominator: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable],
    confidence: float = 0.95,
) -> Estimate:
    """sum(numerator) / sum(denominator) over units [n], with its cluster-robust interval.

    Raises:
        DataError: the three arguments differ in length, or a value is not finite.
    """
    top, bottom = np.asarray(numerator, dtype=float), np.asarray(denominator, dtype=float)
    if not len(top) == len(bottom) == len(clusters):
        raise DataError(f"expected one value and one cluster a unit, got {len(top)}, {len(bottom)}, {len(clusters)}")
    if not (np.isfinite(top).all() and np.isfinite(bottom).all()):
        raise DataError("expected finite values: a unit without a score is left out, not passed as NaN")
    names: dict[Hashable, int] = {}
    index = [names.setdefault(cluster, len(names)) for cluster in clusters]
    total, count = bottom.sum(), len(names)
    if total == 0:
        return Estimate(math.nan, math.nan, math.nan, len(top), count)
    value = float(top.sum() / total)
    if count < 2:
        return Estimate(value, math.nan, math.nan, len(top), count)
    residual = np.bincount(index, weights=top - value * bottom, minlength=count)  # [G]
    error = math.sqrt(count / (count - 1) * float(residual @ residual)) / abs(total)
    half = float(stats.t.ppf(0.5 + confidence / 2, count - 1)) * error
    return Estimate(value, value - half, value + half, len(top), count)
