"""The errors of the toolkit: one small family, so that a caller may catch all of them at once."""

from __future__ import annotations

__all__ = [
    "BudgetError",
    "CacheError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "NammTransferError",
    "UnsupportedModelError",
    "VideoError",
]


class NammTransferError(Exception):
    """Base of every error that the toolkit raises on purpose."""


class ConfigError(NammTransferError, ValueError):
    """A setting is unknown, out of range, or does not fit another one."""


class BudgetError(ConfigError):
    """A token budget is missing, of a wrong type, or out of range."""


class CheckpointError(NammTransferError, ValueError):
    """A parameter file or vector is missing, truncated, of a wrong size, or not finite."""


class UnsupportedModelError(NammTransferError, TypeError):
    """A model lacks the structure that an adapter needs."""


class CacheError(NammTransferError, RuntimeError):
    """A memory is used with a model, a batch or a file that it does not fit."""


class VideoError(NammTransferError, ValueError):
    """A video file is missing, unreadable, or holds no frames."""


class DataError(NammTransferError, ValueError):
    """A data set, an environment or a result file does not hold what was expected."""
