"""What candidates are worth, from what they did on the samples of a generation; and how far that can be trusted.

Shape legend: P candidates, S samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import spearmanr

from namm_transfer.errors import DataError
from namm_transfer.evolution.config import EvolutionConfig
from namm_transfer.evolution.readers import Outcome

__all__ = ["agreement", "kept_by_threshold", "mean_kept", "samples_due", "standardised", "utilities"]

_SMALLEST_SPREAD = 0.005
"""Nats; about what bfloat16 alone changes between two layouts of the same computation."""
_SMOOTHING = 0.8
"""Of the running mean of the agreement."""
_GROWTH = 1.15
_SPLITS = 16


def utilities(outcomes: Sequence[Outcome], price: float) -> np.ndarray:
    """What each candidate made of each sample, [S, P] in nats: log-likelihood against the full cache's, minus the price
    of what was kept where it was for the candidate to say how much, `price` times its square.

    What is lost grows about evenly with what is evicted, so that at an even price the best is to keep everything or
    next to nothing. The square makes each token dearer than the one before, and the best lies between.

    A candidate whose value is not finite gets the sample's worst; a sample on which none is finite is left out.

    Raises:
        DataError: no candidate has a finite value on any sample.
    """
    found = np.stack([o.difference - (price * o.kept**2 if o.budget is None else 0.0) for o in outcomes])
    some = np.isfinite(found).any(1)
    if not some.any():
        raise DataError(
            f"none of {len(outcomes)} samples gave any candidate a finite value; the full cache's own log-likelihoods "
            f"are {[round(outcome.full, 3) for outcome in outcomes]}, fractions kept {[o.kept[0] for o in outcomes]}"
        )
    found = found[some]
    finite = np.isfinite(found)
    worst = np.where(finite, found, np.inf).min(1, keepdims=True)
    return np.where(finite, found, worst)


def standardised(worth: np.ndarray) -> np.ndarray:
    """Fitness [P] from utilities [S, P]: each sample's standardised over the candidates, averaged over samples.

    Samples differ much in what a memory can lose on them (a budget of 0.2 hides a number that one of 0.5 keeps; a
    continuation needs little memory at all). Standardised, each has the same say in the order of the candidates.
    """
    centred = worth - worth.mean(1, keepdims=True)
    spread = np.maximum(worth.std(1, keepdims=True), _SMALLEST_SPREAD)
    return np.asarray((centred / spread).mean(0))


def agreement(worth: np.ndarray) -> float:
    """Rank correlation of the fitness on one half of the samples with that on the other, from utilities [S, P].

    Near 0, the order of the candidates is noise; selection then moves the search at random. The mean over random
    halves: kinds and budgets take turns, so that halves by number would differ in more than chance. A split whose one
    half tells no candidates apart counts as 0.
    """
    rng, found = np.random.default_rng(0), []
    for _ in range(_SPLITS):
        order = rng.permutation(len(worth))
        halves = standardised(worth[order[::2]]), standardised(worth[order[1::2]])
        flat = any(np.ptp(half) == 0 for half in halves)
        found.append(0.0 if flat else float(spearmanr(*halves).statistic))
    return float(np.mean(found))


def samples_due(config: EvolutionConfig, agreements: Sequence[float]) -> int:
    """Samples of the next generation, from the agreements of all generations so far.

    While their running mean is below `config.agreement`, the number grows by a step per generation; it never shrinks.
    Source: uncertainty handling as in Hansen et al., "A Method for Handling Uncertainty in Evolutionary Optimization"
    (IEEE TEC 2009), with the split of samples in place of a re-evaluation.
    """
    count, mean = float(config.samples), config.agreement
    for value in agreements:
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * value
        if mean < config.agreement:
            count = min(count * _GROWTH, config.samples_max)
    return int(count)


def kept_by_threshold(outcomes: Sequence[Outcome]) -> np.ndarray:
    """What candidates kept where it was for them to say, [P]; over all samples if none is read by threshold."""
    return mean_kept([outcome for outcome in outcomes if outcome.budget is None] or outcomes)


def mean_kept(outcomes: Sequence[Outcome]) -> np.ndarray:
    """Mean over samples of the fraction that each candidate kept, [P]; a sample without a decision is left out.

    Raises:
        DataError: there was no decision in any sample.
    """
    kept = np.stack([outcome.kept for outcome in outcomes])  # [S, P]; a decision falls at the same token for all
    decided = ~np.isnan(kept).any(1)
    if not decided.any():
        raise DataError(f"no decision was taken in any of {len(outcomes)} samples: they are shorter than the intervals")
    return np.asarray(kept[decided].mean(0))
