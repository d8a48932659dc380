"""D4RL's HDF5 files as typed episodes.

Shapes: N timesteps of a file, O observation width, A action width.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from namm_transfer.errors import ConfigError, DataError
from namm_transfer.eval.offline_rl.episodes import Episode

__all__ = ["load_d4rl"]

_ARRAYS = {"observations": 2, "actions": 2, "rewards": 1, "terminals": 1, "timeouts": 1}
"""Arrays of a file, and their axes."""


def load_d4rl(path: Path) -> list[Episode]:
    """Read the episodes of a D4RL file: `terminals` ended one as the environment says, `timeouts` as its time limit.

    What follows the last end is an episode that the recording cut off: it is left out with a warning, as D4RL's own
    `sequence_dataset` does. An episode's `seed` is its number in the file, which does not tell the environment's.

    Raises:
        ConfigError: h5py is not installed.
        DataError: the file is missing, truncated or no HDF5; an array is missing or of a wrong shape, or holds a value
            that is not finite; no episode ends.
    """
    try:
        import h5py
    except ImportError as error:
        raise ConfigError("reading HDF5 needs h5py: pip install 'namm-transfer[d4rl]'") from error
    if not path.is_file():
        raise DataError(f"no D4RL file at {path}")
    try:
        with h5py.File(path, "r") as file:
            if missing := [name for name in _ARRAYS if name not in file]:
                raise DataError(
                    f"{path} lacks {', '.join(missing)}; it holds {', '.join(sorted(file))}. D4RL's v2 files tell "
                    "terminals (the environment ended it) from timeouts (the time limit did)"
                )
            arrays = {name: np.asarray(file[name][()]) for name in _ARRAYS}
    except (OSError, RuntimeError, KeyError, TypeError) as error:  # h5py's for what is truncated, depending on where
        raise DataError(f"{path} is truncated or no HDF5 file: {error}") from error
    _check(path, arrays)
    terminated, truncated = arrays["terminals"].astype(bool), arrays["timeouts"].astype(bool)
    ends = np.flatnonzero(terminated | truncated) + 1
    if not len(ends):
        raise DataError(f"{path}: none of its {len(terminated)} timesteps ends an episode")
    if left := len(terminated) - int(ends[-1]):
        warnings.warn(f"{path}: its last {left} timesteps are of an episode cut off, and are left out", stacklevel=2)
    starts = np.concatenate([[0], ends[:-1]])
    try:
        return [
            Episode(
                number,
                arrays["observations"][start:end].astype(np.float32, copy=False),
                arrays["actions"][start:end].astype(np.float32, copy=False),
                arrays["rewards"][start:end].astype(np.float64),
                bool(terminated[end - 1]),
                bool(truncated[end - 1]),
            )
            for number, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True))
        ]
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _check(path: Path, arrays: dict[str, NDArray[np.generic]]) -> None:
    steps = arrays["rewards"].shape[0] if arrays["rewards"].ndim else 0
    for name, rank in _ARRAYS.items():
        array = arrays[name]
        if array.ndim != rank or len(array) != steps or not steps:
            raise DataError(f"{path}: {name} has shape {array.shape}; expected {rank} axes and {steps} > 0 timesteps")
        if array.dtype.kind not in "fiub":
            raise DataError(f"{path}: {name} is {array.dtype}; expected numbers")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = np.argwhere(~np.isfinite(array))
            raise DataError(
                f"{path}: {name} holds {len(bad)} values that are NaN or infinite, the first at timestep {bad[0][0]}"
            )
