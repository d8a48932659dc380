"""The learned policy: a NAMM scores tokens by the spectrum of the attention that they get.

Shape legend: R rows of a run, K KV heads, N retained tokens, t queries of a tile, P parameter vectors.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from namm_transfer import network
from namm_transfer.errors import CheckpointError, ConfigError
from namm_transfer.network import NAMM, NUM_PARAMETERS
from namm_transfer.scoring import Fields, LayerView, Policy, recent
from namm_transfer.spectrogram import BINS, HOP, advance, listen, loaded, stored
from namm_transfer.store import TokenStore
from namm_transfer.tiles import Observed

__all__ = ["FeatureStatistics", "NAMMPolicy"]

Eviction = Literal["per_head", "reference"]


@dataclass
class FeatureStatistics:
    """Count, mean and variance of the 17 spectral features over every token scored, in float64."""

    count: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))
    squares: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))

    def add(self, ema: Tensor) -> None:
        """Count the features of some tokens, [M, 17]."""
        wide = ema.double().cpu()
        self.count += len(wide)
        self.total += wide.sum(0)
        self.squares += wide.square().sum(0)

    def __add__(self, other: FeatureStatistics) -> FeatureStatistics:
        return FeatureStatistics(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> Tensor:
        """[17] float32."""
        return (self.total / max(self.count, 1)).float()

    @property
    def var(self) -> Tensor:
        """[17] float32, of the population."""
        mean = self.total / max(self.count, 1)
        return (self.squares / max(self.count, 1) - mean.square()).clamp_min(0).float()


@dataclass(frozen=True, kw_only=True, eq=False)
class NAMMPolicy(Policy):
    """Evict what the NAMM scores below a threshold; or, with a budget, keep its best-scoring tokens.

    Attributes:
        namm: the network; frozen.
        threshold: zero, where a NAMM was calibrated; higher keeps less. Of no effect with a budget.
        eviction: "per_head": each head of each row drops exactly its own negative tokens. "reference": as the
            published code does, every head of every row drops only as many as the one that drops fewest, lowest
            scores first. Of no effect with a budget.
        vectors: [B, 4172], a parameter vector for each row of the batch: a population. Overrides ``namm.vector``.
        statistics: counts the features of every token scored.
    """

    name: ClassVar[str] = "namm"
    observes: ClassVar[bool] = True
    optional_budget: ClassVar[bool] = True
    namm: NAMM
    threshold: float = 0.0
    eviction: Eviction = "per_head"
    vectors: Tensor | None = None
    statistics: FeatureStatistics | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.namm, NAMM):
            raise ConfigError(f"policy 'namm' needs namm=NAMM, e.g. NAMM.from_pretrained('default'); got {self.namm!r}")
        if self.eviction not in ("per_head", "reference"):
            raise ConfigError(f"eviction must be 'per_head' or 'reference'; got {self.eviction!r}")
        number = isinstance(self.threshold, Real) and not isinstance(self.threshold, bool)
        if not number or not math.isfinite(self.threshold):
            raise ConfigError(f"threshold must be a finite number; got {self.threshold!r}")
        if self.vectors is not None and not isinstance(self.vectors, Tensor):
            raise ConfigError(f"vectors must be a tensor [rows, {NUM_PARAMETERS}]; got {type(self.vectors).__name__}")
        if self.statistics is not None and not isinstance(self.statistics, FeatureStatistics):
            raise ConfigError(f"statistics must be a FeatureStatistics; got {self.statistics!r}")
        for name, value in (*self.namm.state_dict().items(), ("vectors", self.vectors)):
            if value is not None and not torch.isfinite(value).all():
                bad = int((~torch.isfinite(value)).sum())
                raise CheckpointError(f"NAMM {name} holds {bad} values that are NaN or infinite")
        if self.vectors is not None and (self.vectors.ndim != 2 or self.vectors.shape[1] != NUM_PARAMETERS):
            raise CheckpointError(f"vectors must have shape [rows, {NUM_PARAMETERS}]; got {tuple(self.vectors.shape)}")

    def fields(self, dtype: torch.dtype) -> Fields:
        state = _state(dtype)
        return {"ema": ((BINS,), state), "previous": ((HOP,), state)}

    def unfinished_fields(self, dtype: torch.dtype) -> Fields:
        return {"waiting": ((HOP,), _state(dtype))}

    def check_rows(self, rows: int, chosen: list[int] | None = None) -> None:
        if self.vectors is None:
            return
        if rows != len(self.vectors):
            raise ConfigError(f"vectors has {len(self.vectors)} rows, but the batch has {rows}")
        if chosen is not None and chosen != list(range(rows)):
            raise ConfigError(f"the rows of a population cannot be repeated or reordered; got rows {chosen} of {rows}")

    def observe(self, view: LayerView, attn: Observed) -> None:
        tokens, count, phase = view.tokens, attn.count, view.queries % HOP
        if phase == 0 and count % HOP == 0:
            attn.advance(tokens["ema"], tokens["previous"])
            return
        waiting = tokens["waiting"]
        (rows,) = attn  # of an unfinished hop
        waiting[..., phase : phase + count] = stored(rows, waiting.dtype).transpose(-1, -2)
        if phase + count == HOP:
            advance(tokens["ema"], tokens["previous"], loaded(waiting).transpose(-1, -2))
            waiting.zero_()

    def observe_apart(
        self, tokens: TokenStore, layer: int, interval: int, queries: list[int], moving: list[bool], attn: Observed
    ) -> None:
        (rows,) = attn
        plain = type(self).observe is NAMMPolicy.observe  # not one that wants to be shown each tile
        held = tokens.fields  # with the places that are free
        if not plain or not listen(held["ema"], held["previous"], held["waiting"], rows, queries, moving):
            super().observe_apart(tokens, layer, interval, queries, moving, attn)

    def features(self, view: LayerView) -> Tensor:
        """[R, K, N, 25] the network's input."""
        recency = view.seen - 1 - view.tokens["positions"]
        mean, var = (x.to(recency.device) for x in (self.namm.feature_mean, self.namm.feature_var))
        return network.features(recency, loaded(view.tokens["ema"]), mean, var)

    def scores(self, view: LayerView) -> Tensor:
        device = view.tokens.lengths.device
        if self.statistics is not None:
            self.statistics.add(loaded(view.tokens["ema"][view.valid()]))
        if self.vectors is None:
            vectors = self.namm.vector.unsqueeze(0)
        else:
            vectors = self.vectors[slice(*view.rows)]
        lengths = None if view.tokens.even else view.tokens.lengths
        weights = network.unflatten(vectors.detach().float().to(device))
        # the attention that the features are made of is no more precise than the model
        precision = torch.bfloat16 if view.tokens.places()[0].dtype == torch.bfloat16 else torch.float32
        return network.scores(weights, self.features(view), lengths, precision=precision)

    def decide(self, view: LayerView) -> Tensor:
        scores = self.scores(view)
        if self.budget is not None:
            return self.rank(view, scores)
        keep = recent(view, scores, 1) >= self.threshold
        if self.eviction == "per_head":
            return keep
        drop = ~keep & view.valid()
        fewest = int(drop.sum(-1).min())
        lowest = torch.argsort(scores.masked_fill(~drop, float("inf")), dim=-1, stable=True)[..., :fewest]
        return torch.ones_like(keep).scatter_(2, lowest, False)

    def describe(self) -> dict[str, Any]:
        described = super().describe() | {"eviction": self.eviction, "namm": self.namm.fingerprint()}
        if self.threshold:
            described["threshold"] = float(self.threshold)
        if self.vectors is not None:
            described["vectors"] = hashlib.sha256(self.vectors.float().cpu().numpy().tobytes()).hexdigest()[:16]
        return described


def _state(dtype: torch.dtype) -> torch.dtype:
    """State is as wide as the keys: 33 values a token are a quarter of the bytes of keys and values of width 64."""
    return torch.float32 if dtype in (torch.float32, torch.float64) else torch.float16
