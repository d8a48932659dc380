"""The settings of one evolution."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from namm_transfer.errors import ConfigError
from namm_transfer.evolution.kinds import KINDS

__all__ = ["EvolutionConfig"]

# When to stop and how to spread the work do not touch what is searched: a run may be resumed with other values.
_FREE_TO_CHANGE = frozenset({"generations", "minutes", "workers"})
_DRAWS = 5
"""What the settings mean (budgets were once drawn otherwise, the price was linear, and a decision could fall behind the
answers); part of the identity."""


@dataclass(frozen=True)
class EvolutionConfig:
    """Settings of one evolution, checked when made; vary them with `dataclasses.replace`.

    Attributes:
        hosts: names, folders or Hub ids of language models, see `hosts.load_host`; drawn per sample.
        seed: of the search and of every sample.
        population: candidates per generation.
        imitation_samples: samples of whose attention is learned, before all else, what will be needed (see
            `imitation`); 0: none.
        imitation_heads: heads noted of each of them.
        imitation_steps: gradient steps on what was noted.
        descent_steps: gradient steps before the search, which begins where they end (see `descent`); 0: none. Without
            imitation and descent the search begins at zero, as published.
        descent_samples: samples of a step.
        descent_rate: learning rate of the first steps; it falls to a twentieth along half a cosine.
        sigma: initial standard deviation of the candidates in every parameter.
        sigma_max: bound on it; None for none. Where noise rules, a search widens without end.
        diagonal: keep the search's covariance diagonal (pycma's `CMA_diagonal`).
        generations: stop after this many.
        minutes: stop after the generation in which this much time of one call has passed; None for no limit.
        kinds: kinds of samples; a generation meets them in turn, so a kind listed twice comes twice as often.
        stage_generations: generations after which the next of `kinds` joins (the paper's incremental stages);
            None: all of them from the start.
        samples: samples of the first generation; all candidates meet the same ones.
        samples_max: most samples of a generation.
        agreement: rank correlation of the fitness on one half of a generation's samples with that on the other half;
            while its running mean is below this, the number of samples grows, up to `samples_max`.
        lengths: pairs of text length before the first question and tokens between two evictions (the update interval,
            a multiple of 16, at most the length; where a sample's answers begin before that, the last multiple before
            them), drawn per sample.
        questions: questions that a sample asks, for the kinds that can ask many.
        budgets: fractions of the tokens seen that a candidate may keep, by rank; null: it keeps what it scores above
            its threshold, and pays `price`. Every kind meets each of them in turn.
        price: nats per answer token that keeping everything by threshold costs; a quarter of them for half, and so on
            with the square of what is kept.
        normaliser_samples: samples on which the feature normaliser is measured before the first generation.
        validate_every: generations between two validations of the mean.
        validation_samples: fixed samples of the validation documents, per validation.
        kept_fraction: what eviction by threshold should keep on average on training documents, set by the last bias
            after the search; null: the threshold stays as evolved.
        workers: processes that share the samples of a generation, each with one CPU thread and its own host.
        rows_at_once: candidates evaluated as rows of one batch.
    """

    hosts: tuple[str, ...] = ("smollm2-135m-instruct",)
    seed: int = 0
    population: int = 32
    imitation_samples: int = 0
    imitation_heads: int = 24
    imitation_steps: int = 600
    descent_steps: int = 0
    descent_samples: int = 8
    descent_rate: float = 0.01
    sigma: float = 0.065
    sigma_max: float | None = None
    diagonal: bool = False
    generations: int = 60
    minutes: float | None = None
    kinds: tuple[str, ...] = tuple(KINDS)
    stage_generations: int | None = None
    samples: int = 16
    samples_max: int = 48
    agreement: float = 0.3
    lengths: tuple[tuple[int, int], ...] = ((540, 512), (540, 256), (420, 128))
    questions: int = 3
    budgets: tuple[float | None, ...] = (0.2, None, 0.35, None, 0.5)
    price: float = 1.0
    normaliser_samples: int = 12
    validate_every: int = 5
    validation_samples: int = 35
    kept_fraction: float | None = None
    workers: int = 1
    rows_at_once: int = 32

    def __post_init__(self) -> None:
        for field in fields(self):  # YAML and Hydra give lists
            value = getattr(self, field.name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                nested = (tuple(v) if isinstance(v, Sequence) and not isinstance(v, str) else v for v in value)
                object.__setattr__(self, field.name, tuple(nested))
        for name in (
            *("population", "generations", "samples", "samples_max", "questions", "normaliser_samples"),
            *("validate_every", "validation_samples", "workers", "rows_at_once", "descent_samples"),
            *("imitation_heads", "imitation_steps"),
        ):
            _require(_is_count(getattr(self, name)), name, "an integer >= 1", self)
        stage = self.stage_generations
        _require(stage is None or _is_count(stage), "stage_generations", "an integer >= 1, or null", self)
        _require(_all(self.hosts, lambda h: isinstance(h, str) and h), "hosts", "names, folders or Hub ids", self)
        _require(isinstance(self.diagonal, bool), "diagonal", "true or false", self)
        _require(self.population >= 4, "population", "at least 4", self)
        _require(self.samples >= 2, "samples", "at least 2", self)
        _require(self.samples_max >= self.samples, "samples_max", f"at least samples, {self.samples}", self)
        _require(type(self.seed) is int and self.seed >= 0, "seed", "an integer >= 0", self)
        for name in ("imitation_samples", "descent_steps"):
            value = getattr(self, name)
            _require(type(value) is int and value >= 0, name, "an integer >= 0", self)
        for name in ("sigma", "descent_rate"):
            value = getattr(self, name)
            _require(_is_number(value) and value > 0, name, "a positive number", self)
        for name in ("sigma_max", "minutes"):
            value = getattr(self, name)
            _require(value is None or (_is_number(value) and value > 0), name, "a positive number, or null", self)
        _require(_is_number(self.agreement) and self.agreement <= 1, "agreement", "a number <= 1", self)
        _require(_is_number(self.price) and self.price >= 0, "price", "a number >= 0", self)
        kept = self.kept_fraction
        _require(kept is None or (_is_number(kept) and 0 < kept < 1), "kept_fraction", "between 0 and 1, or null", self)
        _require(_all(self.kinds, lambda kind: kind in tuple(KINDS)), "kinds", f"some of {tuple(KINDS)}", self)
        _require(
            _all(self.budgets, lambda b: b is None or (_is_number(b) and 0 < b < 1)),
            "budgets",
            "fractions between 0 and 1, or null for eviction by threshold",
            self,
        )
        _require(
            _all(self.lengths, lambda pair: isinstance(pair, tuple) and len(pair) == 2 and all(map(_is_count, pair))),
            "lengths",
            "pairs of integers, [context tokens, update interval]",
            self,
        )
        for context, interval in self.lengths:
            _require(interval % 16 == 0, "lengths", "pairs whose update interval is a multiple of 16", self)
            _require(
                128 <= context >= interval,
                "lengths",
                "pairs of a context of at least 128 tokens and an interval no longer, so that every sample meets a "
                "decision",
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
            name: json.loads(json.dumps(value)) for name, value in asdict(self).items() if name not in _FREE_TO_CHANGE
        }


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _all(values: object, check: Any) -> bool:
    return isinstance(values, tuple) and bool(values) and all(check(value) for value in values)


def _require(condition: bool, name: str, expected: str, config: EvolutionConfig) -> None:
    if not condition:
        raise ConfigError(f"evolution setting {name} must be {expected}; got {getattr(config, name)!r}")
