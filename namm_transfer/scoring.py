"""What every policy is: it may watch attention, it scores tokens, and the lowest scores are evicted.

Shape legend: R rows of a run, K KV heads, N retained tokens (the fullest head's), t queries of a tile.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from namm_transfer.errors import BudgetError, ConfigError
from namm_transfer.ranking import best
from namm_transfer.spectrogram import HOP
from namm_transfer.store import Fields, TokenStore
from namm_transfer.tiles import Observed

__all__ = ["Fields", "LayerView", "Policy", "check_budget", "check_count", "recent", "runs"]

Budget = int | float
Allocation = Literal["per_head", "per_layer"]


@dataclass
class LayerView:
    """What a policy sees of one layer: the retained tokens of some rows, all at the same point of their sequences.

    Attributes:
        tokens: the store; ``tokens["positions"]`` is [R, K, N], and so is every field the policy declared.
        layer: the layer's number.
        rows: the rows' numbers in the batch, [start, stop).
        seen: tokens that have existed; the newest has position ``seen - 1``.
        queries: queries observed before the present tile; equals ``seen`` at decisions of causal models.
        interval: queries between two decisions.
    """

    tokens: TokenStore
    layer: int
    rows: tuple[int, int]
    seen: int
    queries: int
    interval: int

    def valid(self) -> Tensor:
        """[R, K, N] bool: the place holds a token."""
        return self.tokens.valid()

    def age(self) -> Tensor:
        """[R, K, N] int: places from the newest retained token (0) towards the oldest; negative for padding."""
        index = torch.arange(self.tokens.width, device=self.tokens.lengths.device)
        return self.tokens.lengths.unsqueeze(-1) - 1 - index


def check_budget(budget: Any, *, optional: bool = False) -> Budget | None:
    """A budget as it may be given, as int (tokens) or float (a fraction of the tokens seen); NumPy's numbers too.

    Raises:
        BudgetError: it is missing, of another type, or out of range.
    """
    if budget is None and optional:
        return None
    if isinstance(budget, bool) or not isinstance(budget, Real):
        raise BudgetError(f"a budget is an int (tokens) or a float (fraction of the tokens seen); got {budget!r}")
    budget = int(budget) if isinstance(budget, Integral) else float(budget)
    if isinstance(budget, int) and budget < 1:
        raise BudgetError(f"a budget in tokens must be at least 1; got {budget}")
    if isinstance(budget, float) and not (math.isfinite(budget) and 0 < budget <= 1):
        raise BudgetError(f"a budget as a fraction must lie in (0, 1]; got {budget}")
    return budget


def check_count(name: str, value: Any, least: int) -> None:
    """Raise ConfigError unless ``value`` is an int of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be an int of at least {least}; got {value!r}")


def recent(view: LayerView, scores: Tensor, count: int) -> Tensor:
    """Lift the ``count`` newest tokens above every score."""
    return scores.masked_fill(view.age() < count, math.inf)


def runs(points: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Neighbouring rows [first, last) that are at the same point: equal entries of ``points``."""
    first = 0
    for last in range(1, len(points) + 1):
        if last == len(points) or points[last] != points[first]:
            yield first, last
            first = last


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """A policy holds settings only; all state is in the memory, so that one policy serves any number of caches.

    Attributes:
        budget: tokens a head may keep after a decision: int, or float for a fraction of the tokens seen.
        allocation: "per_head": each head keeps so many. "per_layer": the heads of a layer compete for what they may
            keep together, so that one that needs much takes it from one that needs little (Feng et al., "Ada-KV",
            NeurIPS 2025). For scores that mean the same in every head.
        kinds: the tokens are of so many kinds in turn (a decision transformer's are a return, a state and an action).
            Each kind gets an equal part of the budget, for which its tokens compete among themselves: kinds that get
            little attention throughout are not forgotten for that. Parts that differ are given one by one: (2, 1, 1).
        segment: every so many positions, counted from the first token, are a segment (about a frame, a second of
            video). Segments take turns at the budget: each keeps its best token, then each its second best, and so on,
            so that a dull one is forgotten only where there are more segments than the budget has tokens.
    """

    name: ClassVar[str]
    observes: ClassVar[bool] = False
    """The policy must see attention probabilities."""
    evicts: ClassVar[bool] = True
    """The policy ever decides; if not, the memory keeps everything."""

    budget: Budget | None = field(default=None)
    allocation: Allocation = "per_head"
    kinds: int | Sequence[int] = 1
    segment: int | None = None

    optional_budget: ClassVar[bool] = False
    """The policy works without a budget too."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", check_budget(self.budget, optional=self.optional_budget))
        if self.allocation not in get_args(Allocation):
            raise ConfigError(f"allocation must be one of {get_args(Allocation)}; got {self.allocation!r}")
        if isinstance(self.kinds, Sequence) and not isinstance(self.kinds, str):
            object.__setattr__(self, "kinds", tuple(self.kinds))
            check_count("the number of kinds", len(self.parts), 1)
        for part in self.parts if isinstance(self.kinds, tuple) else (self.kinds,):
            check_count("kinds", part, 1)
        if self.segment is not None:
            check_count("segment", self.segment, 1)
        if self.budget is None and (len(self.parts) > 1 or self.segment is not None):
            raise ConfigError("kinds and segment divide a budget, and there is none: give one, e.g. budget=0.5")

    def fields(self, dtype: torch.dtype) -> Fields:
        """State per token, for keys of ``dtype``; new tokens start at zero."""
        return {}

    def unfinished_fields(self, dtype: torch.dtype) -> Fields:
        """State per token that is there only while a hop of 16 queries is unfinished; it starts at zero."""
        return {}

    def check_rows(self, rows: int, chosen: list[int] | None = None) -> None:  # noqa: B027 (optional)
        """Raise ConfigError if the policy cannot serve a batch of ``rows`` rows, or one remade of the ``chosen``."""

    def observe(self, view: LayerView, attn: Observed) -> None:  # noqa: B027 (optional: not every policy looks)
        """Take note of a tile of attention, float32, averaged over the query heads of a KV head.

        A tile never crosses the end of a hop of 16 queries, unless it begins and ends with one. Its probabilities
        [R, K, t, N] come in parts (``for part in attn``), all at once only if there are at most 16 queries; what
        :class:`Observed` folds, a backend may fold without them.
        """

    def observe_apart(
        self, tokens: TokenStore, layer: int, interval: int, queries: list[int], moving: list[bool], attn: Observed
    ) -> None:
        """Take note of a tile of fewer than 16 queries of rows that may be at different points of their sequences.

        What is the same for every policy: :meth:`observe` is shown neighbours at the same point, hop by hop. A policy
        that overrides it does the same at once.

        Args:
            tokens, layer, interval: as of a :class:`LayerView`, of all B rows.
            queries: B counts of the queries that each row has made before these.
            moving: which of the B rows make these queries; the others are to be left alone.
            attn: as of :meth:`observe`, but the queries may cross the end of a row's hop.
        """
        (probabilities,) = attn  # of less than a hop
        count = probabilities.shape[2]
        for first, last in runs(list(zip(queries, moving, strict=True))):
            if not moving[first]:
                continue
            done, part = queries[first], tokens.rows(first, last, aligned=True)
            end = min(HOP - done % HOP, count)  # of the hop
            for start, stop in ((0, end), (end, count)):
                if start < stop:
                    view = LayerView(part, layer, (first, last), done + count, done + start, interval)
                    self.observe(view, Observed(probabilities[first:last, :, start:stop]))

    @abstractmethod
    def scores(self, view: LayerView) -> Tensor:
        """[R, K, N] float32; higher is kept longer. Values of padding mean nothing."""

    def decide(self, view: LayerView) -> Tensor:
        """[R, K, N] bool: the tokens to retain. By rank within the budget; the newest token always stays."""
        return self.rank(view, self.scores(view))

    @property
    def parts(self) -> tuple[int, ...]:
        """The budget's parts for each kind of tokens."""
        return (1,) * self.kinds if isinstance(self.kinds, int) else tuple(self.kinds)

    def allowance(self, view: LayerView) -> int:
        """The budget in tokens at this decision."""
        budget = check_budget(self.budget)
        tokens = round(budget * view.seen) if isinstance(budget, float) else budget
        return max(1, min(int(tokens or 1), view.seen))

    def rank(self, view: LayerView, scores: Tensor) -> Tensor:
        """The best tokens within the budget, of each head or of all together; between equal scores the newer stays."""
        count = self.allowance(view)
        finite = torch.finfo(torch.float32)  # NaN is evicted first, but is no padding; what must stay is infinite
        ranked = recent(view, scores.float().nan_to_num(finite.min, math.inf, finite.min), 1)
        ranked = ranked.masked_fill(~view.valid(), -math.inf)
        segments = view.tokens["positions"].long() // self.segment if self.segment else None
        choose = partial(best, segments=segments, together=self.allocation == "per_layer")
        parts, whole = self.parts, sum(self.parts)
        if len(parts) == 1:
            return choose(ranked, count) & view.valid()
        kind, newest = view.tokens["positions"] % len(parts), (view.seen - 1) % len(parts)
        left = count - sum(count * part // whole for part in parts)  # for the newest token's kind, and those before it
        chosen = torch.zeros_like(view.valid())
        for number, part in enumerate(parts):
            own = kind == number
            share = count * part // whole + int((newest - number) % len(parts) < left)
            chosen |= choose(ranked.masked_fill(~own, -math.inf), share) & own
        return chosen & view.valid()

    def describe(self) -> dict[str, Any]:
        """The settings as plain values, to be written beside results and saved memories."""
        kinds = self.kinds if isinstance(self.kinds, int) else list(self.kinds)
        described: dict[str, Any] = {"name": self.name, "budget": self.budget, "allocation": self.allocation}
        described |= {} if kinds == 1 else {"kinds": kinds}
        return described | ({} if self.segment is None else {"segment": self.segment})
