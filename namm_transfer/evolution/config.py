"""The settings of one evolution."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from namm_transfer.errors import ConfigError
from namm_transfer.evolution.tasks import KINDS

__all__ = ["EvolutionConfig"]

# When to stop and how to spread the work do not touch what is searched: a run may be resumed with other values.
_FREE_TO_CHANGE = frozenset({"generations", "minutes", "workers", "rows_at_once"})
_DRAWS = 2
"""How `readers.draw` makes a sample of a job; part of the identity, since the same settings once drew other budgets."""


@dataclass(frozen=True)
class EvolutionConfig:
    """Settings of one evolution, checked when made; vary them with `dataclasses.replace`.

    Attributes:
        host: name, folder or Hub id of the language model, see `hosts.load_host`.
        seed: of the search and of every sample.
        population: candidates per generation.
        sigma: initial standard deviation of the candidates in every parameter.
        diagonal: keep the search's covariance diagonal (pycma's `CMA_diagonal`).
        generations: stop after this many.
        minutes: stop after the generation in which this much time of one call has passed; None for no limit.
        kinds: kinds of samples; a generation meets them in turn, so a kind listed twice comes twice as often.
        samples: samples per generation; all candidates meet the same ones.
        context_tokens: text lengths before the first question, in tokens, drawn per sample.
        questions: questions a needle sample asks.
        budgets: fractions of the tokens seen that a candidate may keep; every kind meets each of them in turn.
        update_intervals: tokens between two evictions, drawn per sample; multiples of 16, and none longer than the
            shortest context: such a sample would be answered before the first decision.
        normaliser_samples: samples on which the feature normaliser is measured before the first generation.
        validate_every: generations between two validations of the mean.
        validation_samples: fixed samples of the validation documents, per validation.
        kept_fraction: what eviction by threshold should keep on average, set by the last bias after the search.
        workers: processes that share the samples of a generation, each with one CPU thread and its own host.
        rows_at_once: candidates evaluated as rows of one batch.
    """

    host: str = "smollm2-135m-instruct"
    seed: int = 0
    population: int = 16
    sigma: float = 0.065
    diagonal: bool = False
    generations: int = 60
    minutes: float | None = None
    kinds: tuple[str, ...] = ("needles", "recall", "needles", "continuation")
    samples: int = 8
    context_tokens: tuple[int, ...] = (192, 256, 256, 384)
    questions: int = 3
    budgets: tuple[float, ...] = (0.2, 0.35, 0.5)
    update_intervals: tuple[int, ...] = (64, 128, 192)
    normaliser_samples: int = 12
    validate_every: int = 5
    validation_samples: int = 24
    kept_fraction: float = 0.4
    workers: int = 1
    rows_at_once: int = 16

    def __post_init__(self) -> None:
        for field in fields(self):  # YAML and Hydra give lists
            value = getattr(self, field.name)
            if not isinstance(value, (str, int, float, bool, type(None))):
                object.__setattr__(self, field.name, tuple(value))
        for name in (
            *("population", "generations", "samples", "questions", "normaliser_samples"),
            *("validate_every", "validation_samples", "workers", "rows_at_once"),
        ):
            _require(type(getattr(self, name)) is int and getattr(self, name) >= 1, name, "an integer >= 1", self)
        _require(isinstance(self.host, str) and bool(self.host), "host", "a name, a folder or a Hub id", self)
        _require(isinstance(self.diagonal, bool), "diagonal", "true or false", self)
        _require(self.population >= 4, "population", "at least 4", self)
        _require(type(self.seed) is int and self.seed >= 0, "seed", "an integer >= 0", self)
        _require(_is_number(self.sigma) and self.sigma > 0, "sigma", "a positive number", self)
        _require(
            self.minutes is None or (_is_number(self.minutes) and self.minutes > 0), "minutes", "positive or null", self
        )
        _require(
            _is_number(self.kept_fraction) and 0 < self.kept_fraction < 1, "kept_fraction", "between 0 and 1", self
        )
        _require(_all(self.kinds, lambda kind: kind in tuple(KINDS)), "kinds", f"some of {tuple(KINDS)}", self)
        _require(
            _all(self.context_tokens, lambda n: type(n) is int and n >= 64), "context_tokens", "integers >= 64", self
        )
        _require(
            _all(self.budgets, lambda b: _is_number(b) and 0 < b < 1), "budgets", "fractions between 0 and 1", self
        )
        _require(
            _all(self.update_intervals, lambda n: type(n) is int and n >= 16 and n % 16 == 0),
            "update_intervals",
            "positive multiples of 16",
            self,
        )
        shortest = min(self.context_tokens)
        _require(
            max(self.update_intervals) <= shortest,
            "update_intervals",
            f"at most {shortest}, the shortest of context_tokens, so that every sample meets a decision",
            self,
        )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Make a config of names and values, as read from YAML.

        Raises:
            ConfigError: a name is unknown or a value does not fit.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"unknown evolution settings {unknown}; known are {sorted(known)}")
        return cls(**values)

    def identity(self) -> dict[str, Any]:
        """The settings that a resumed run must share, as JSON keeps them."""
        return {"draws": _DRAWS} | {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if name not in _FREE_TO_CHANGE
        }


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _all(values: object, check: Any) -> bool:
    return isinstance(values, tuple) and bool(values) and all(check(value) for value in values)


def _require(condition: bool, name: str, expected: str, config: EvolutionConfig) -> None:
    if not condition:
        raise ConfigError(f"evolution setting {name} must be {expected}; got {getattr(config, name)!r}")
