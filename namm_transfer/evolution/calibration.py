"""The threshold of a NAMM, set by its last bias.

Shape legend: P candidates.
"""

from __future__ import annotations

import numpy as np
import torch

from namm_transfer.errors import DataError
from namm_transfer.evolution.config import EvolutionConfig
from namm_transfer.evolution.fitness import mean_kept
from namm_transfer.evolution.readers import Job, Readers
from namm_transfer.network import NAMM

__all__ = ["calibrate", "with_vector"]

_CALIBRATION = 3
"""First entry of the keys of samples; see `run`."""
_SAMPLES = 12


def calibrate(namm: NAMM, config: EvolutionConfig, target: float, readers: Readers) -> tuple[NAMM, float]:
    """Shift the last bias so that eviction by threshold keeps the fraction `target` on training documents.

    Ranks do not depend on the bias, so under a budget the NAMM stays the same.

    Returns:
        The calibrated NAMM and the fraction that it keeps there.

    Raises:
        DataError: no shift within the range tried keeps so much, or so little.
    """
    vector = namm.to_vector().double().numpy()
    shifts = np.concatenate([-np.geomspace(16, 0.02, 6), np.geomspace(0.02, 16, 6)])
    jobs = [Job("train", (_CALIBRATION, i), i, len(config.kinds), by_threshold=True) for i in range(_SAMPLES)]
    for _ in range(3):  # scores have a scale of their own: find the crossing coarsely, then more finely
        shifted = np.repeat(vector[None], len(shifts), 0)
        shifted[:, -1] += shifts
        kept = mean_kept(readers.read(jobs, namm, shifted))
        enough = np.flatnonzero(kept >= target)
        if len(enough) == 0 or enough[0] == 0:
            raise DataError(
                f"no shift of the threshold within [{shifts[0]:.3g}, {shifts[-1]:.3g}] keeps {target} "
                f"of the tokens: kept were {kept.round(3).tolist()}"
            )
        nearest = int(np.abs(kept - target).argmin())
        chosen, fraction = shifts[nearest], float(kept[nearest])
        shifts = np.linspace(shifts[enough[0] - 1], shifts[enough[0]], 6)  # the same samples: it crosses in between
    vector[-1] += chosen
    return with_vector(namm, vector), fraction


def with_vector(namm: NAMM, vector: np.ndarray) -> NAMM:
    """Other parameters [4172] under the same feature normaliser."""
    return NAMM.from_vector(
        torch.from_numpy(vector).float(), feature_mean=namm.feature_mean, feature_var=namm.feature_var
    )
