"""Policies at equal budgets, from the rows of finished runs of one task: what each keeps, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from namm_transfer.errors import DataError
from namm_transfer.eval.results import OK, Row
from namm_transfer.eval.runner import MATCHED, REFERENCE
from namm_transfer.eval.statistics import Estimate, difference, mean, normalised
from namm_transfer.files import replacing

__all__ = ["MATCHED_END", "THRESHOLD", "Line", "as_json", "compare", "curves", "figure", "interval", "markdown"]

MATCHED_END = f"-{MATCHED}"
"""End of the names of columns whose budget is what the column `namm` keeps by threshold."""
THRESHOLD = "@"
"""In the names of columns of another threshold than zero, before it."""
_DASHES = ("-", "--", "-.", (0, (1, 1)), (0, (3, 1, 1, 1, 1, 1)))
"""Of a curve, and of its variants."""


@dataclass(frozen=True)
class Line:
    """One policy over all units.

    Attributes:
        policy: its column in the run.
        budget: what it was given; None for eviction by threshold, and for baselines.
        kept: mean fraction kept just after decisions, over the units that had one; None if none had.
        score: mean over units.
        of_full: fraction of the full cache's score; of its token accuracy where the score is a log-likelihood.
        difference: score minus the full cache's, paired by unit.
        by_kind: mean of that difference per kind of sample, or family of questions.
        ahead: score of the reference at the same budget minus this policy's (of `namm` by threshold, for columns at its
            measured budget); None for itself and where the reference has no such column.
    """

    policy: str
    budget: float | None
    kept: float | None
    score: Estimate
    of_full: Estimate
    difference: Estimate
    by_kind: Mapping[str, float]
    ahead: Estimate | None

    @property
    def name(self) -> str:
        """The policy without its budget or threshold."""
        return self.policy.removesuffix(f"-{self.budget}").removesuffix(MATCHED_END).partition(THRESHOLD)[0]


def compare(rows: Sequence[Row], reference: str = REFERENCE, full: str = "full") -> list[Line]:
    """Pair every policy with the full cache, and with the reference at the same budget.

    Args:
        rows: of one task and seed, the same units under every policy; undecodable ones are left out.
        reference: columns whose name is this, or begins with it and a hyphen, are the reference's.
        full: name of the column of the full cache.

    Returns:
        Lines by budget, best first, the full cache's at the end. Intervals are 95 %, clustered by document, video or
        episode.

    Raises:
        DataError: the rows are of several tasks or seeds, or a policy lacks units.
    """
    if len({(row.task, row.seed) for row in rows}) != 1:
        raise DataError(f"expected the rows of one task and seed; got {sorted({(r.task, r.seed) for r in rows})}")
    columns: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.status == OK:
            columns.setdefault(row.policy, {})[row.unit] = row
    if full not in columns:
        raise DataError(f"no column {full!r} to compare with; there are {sorted(columns)}")
    units = sorted(columns[full])
    for name, column in columns.items():
        if sorted(column) != units:
            raise DataError(f"column {name!r} has {len(column)} units, {full!r} has {len(units)}, or they differ")

    references = {
        column[units[0]].budget: column
        for name, column in columns.items()
        if name == reference or name.startswith(f"{reference}-")
    }
    clusters = [columns[full][unit].cluster for unit in units]
    lines = []
    for name, column in columns.items():
        budget = column[units[0]].budget
        matched = name.endswith(MATCHED_END)
        rival = references.get(None if matched else budget)
        if matched and reference != REFERENCE:
            rival = None  # whose threshold keeps something else
        if name == full or THRESHOLD in name or all(row.kept_at_updates is None for row in column.values()):
            rival = None  # no budget, and yet not that of the reference by its threshold
        lines.append(
            Line(
                policy=name,
                budget=budget,
                kept=_mean([column[unit].kept_at_updates for unit in units]),
                score=mean([_number(column[unit].score) for unit in units], clusters),
                of_full=normalised(
                    [_quality(column[unit]) for unit in units],
                    [_quality(columns[full][unit]) for unit in units],
                    clusters,
                ),
                difference=_paired(column, columns[full], units),
                by_kind=_by_kind(column, columns[full], units),
                ahead=None if rival is None or rival is column else _paired(rival, column, units),
            )
        )

    def place(line: Line) -> tuple[bool, float, float]:
        return line.policy == full, math.inf if line.budget is None else line.budget, -line.score.value

    return sorted(lines, key=place)


def markdown(lines: Sequence[Line], metric: str = "score", reference: str = REFERENCE) -> str:
    """The lines as a Markdown table."""
    kinds = sorted({kind for line in lines for kind in line.by_kind})
    head = ["policy", "budget", "kept", metric, "of full", "difference to full", *kinds, f"{reference} ahead by"]
    table = [head, ["---"] * len(head)]
    for line in lines:
        table.append(
            [
                line.policy,
                "" if line.budget is None else f"{line.budget:g}",
                "–" if line.kept is None else f"{line.kept:.3f}",
                figure(line.score.value),
                interval(line.of_full, sign=""),
                interval(line.difference),
                *(figure(line.by_kind.get(kind, math.nan), sign="+") for kind in kinds),
                "" if line.ahead is None else interval(line.ahead),
            ]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table) + "\n"


def as_json(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """The lines as JSON takes them."""
    return [asdict(line) for line in lines]


def curves(lines: Sequence[Line], title: str, metric: str, path: Path, full: str = "full") -> None:
    """Score against kept fraction, a curve per policy over its budgets, with 95 % intervals.

    What has no budget (a NAMM by threshold, a baseline) is drawn as stars; a variant (`h2o_shared` of `h2o`) has the
    colour of what it varies.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # slow to import, and no backend is touched this way

    canvas = Figure(figsize=(10.5, 6), layout="constrained")
    axes = canvas.subplots()
    by_name: dict[str, list[Line]] = {}
    for line in lines:
        if line.policy != full:
            by_name.setdefault(line.name, []).append(line)
    families: dict[str, list[str]] = {}  # what is drawn in a colour: a name, and those that begin with it
    for name in sorted(by_name):
        base = min((other for other in by_name if name.startswith(f"{other}_")), key=len, default=name)
        families.setdefault(base, []).append(name)
    palette = colormaps["tab20"]
    for number, names in enumerate(families.values()):
        for name, dash in zip(names, cycle(_DASHES), strict=False):
            found, bold = by_name[name], name.startswith("namm")
            curve = sorted((line for line in found if line.budget is not None), key=lambda line: line.budget or 0)
            free = sorted((line for line in found if line.budget is None), key=lambda line: line.kept or 0)
            for part, marker, style in ((curve, "o", dash), (free, "*", ":")):
                if part:
                    axes.errorbar(
                        [line.kept if line.kept is not None else 1.0 for line in part],
                        [line.score.value for line in part],
                        yerr=np.nan_to_num([line.score.half_width for line in part]),
                        marker=marker,
                        ls=style,
                        color=palette((2 * number + number // 10) % 20),  # the ten strong ones first
                        lw=2 if bold else 1,
                        ms=12 if marker == "*" else 4,
                        capsize=2,
                        label=f"{name} by threshold" if marker == "*" and curve else name,
                    )
    for line in lines:
        if line.policy == full:
            axes.axhline(line.score.value, color="black", lw=1, label="full cache")
            if not math.isnan(line.score.low):
                axes.axhspan(line.score.low, line.score.high, color="black", alpha=0.07)
    axes.set(xlabel="fraction kept just after decisions", ylabel=metric, title=title)
    axes.grid(alpha=0.3)
    canvas.legend(loc="outside right center", fontsize="small")
    with replacing(path) as partial:
        canvas.savefig(partial, dpi=110, format="png")


def _paired(one: Mapping[str, Row], other: Mapping[str, Row], units: Sequence[str]) -> Estimate:
    return difference(
        [_number(one[unit].score) for unit in units],
        [_number(other[unit].score) for unit in units],
        [one[unit].cluster for unit in units],
    )


def _quality(row: Row) -> float:
    """What a fraction can be taken of: a score that is no log-likelihood."""
    return float(row.detail.get("token_accuracy", _number(row.score)))


def _by_kind(column: Mapping[str, Row], full: Mapping[str, Row], units: Sequence[str]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for unit in units:
        detail = column[unit].detail
        if kind := detail.get("kind") or detail.get("family"):
            found.setdefault(kind, []).append(_number(column[unit].score) - _number(full[unit].score))
    return {kind: float(np.mean(lost)) for kind, lost in found.items()}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def figure(value: float, sign: str = "") -> str:
    """A number as the tables have it: two decimals, none from 100 on, a dash for NaN; `sign` "+" shows it always."""
    if math.isnan(value):
        return "–"
    return f"{value:{sign}.0f}" if abs(value) >= 100 else f"{value:{sign}.2f}"


def interval(estimate: Estimate, sign: str = "+") -> str:
    """An estimate as the tables have it, `value [low, high]`; a dash where there is no value."""
    if math.isnan(estimate.value):
        return figure(math.nan)
    value, low, high = (figure(v, sign) for v in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"
