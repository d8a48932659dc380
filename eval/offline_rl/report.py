"""What a report says of offline-RL tasks beside the means: interquartile means, and scores over all tasks.

The interquartile mean drops the best and the worst quarter of the episodes: one fall or one lucky run does not move it
(Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice", NeurIPS 2021). Its interval is
from a bootstrap that draws episodes anew within each task (the strata).

Shape letters: n episodes of a task.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

from namm_transfer.errors import DataError
from namm_transfer.eval.results import OK, Row
from namm_transfer.eval.statistics import Estimate

__all__ = ["by_policy", "interquartile_mean", "markdown", "summarise"]

METRIC = "return_raw"
RESAMPLES = 2000
_ABOUT = (
    "Interquartile mean (the middle half of the episodes) and its 95 % interval from a bootstrap within each task;",
    "`score_percent`: 0 is the random policy's return and 100 the good one's, each task by its own references.",
)
_OVER_ALL = "Over all tasks: each with the same weight; only policies that have every one of them."


def interquartile_mean(
    strata: Sequence[Sequence[float]], confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Interquartile mean over all values, with a percentile interval of the stratified bootstrap.

    Args:
        strata: the values [n] of each task; each task has the same weight, however many values it has.
        seed: of the resampling.

    Raises:
        DataError: a value is not finite.
    """
    samples = [np.asarray(values, float) for values in strata if len(values)]
    if not all(np.isfinite(sample).all() for sample in samples):
        raise DataError("expected finite values: an episode without a score is left out, not passed as NaN")
    count = sum(len(sample) for sample in samples)
    if not count:
        return Estimate(math.nan, math.nan, math.nan, 0, 0)
    value = _trimmed(*samples)
    if min(len(sample) for sample in samples) < 2:  # nothing to draw from
        return Estimate(float(value), math.nan, math.nan, count, count)
    interval = stats.bootstrap(
        samples,
        _trimmed,
        n_resamples=resamples,
        confidence_level=confidence,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(float(value), float(interval.low), float(interval.high), count, count)


def summarise(rows: Sequence[Row], order: Sequence[str] = ()) -> dict[str, Any]:
    """Per task and policy the interquartile mean return and, where rows have one, that of the normalised score.

    Returns:
        {"tasks": {task: {policy: {"iqm_return_raw", "iqm_score_percent"}}}, "all": {references: {policy:
        {"iqm_score_percent", "tasks"}}}}: over all tasks that are scored against the same source of references, since
        scores of different scales are never mixed, and only of policies that have every one of these tasks, since
        means over different tasks cannot be compared. Empty if no row is of offline RL.

    Raises:
        DataError: rows of one task were scored against different references.
    """
    scored = [row for row in rows if row.metric == METRIC and row.status == OK]
    found = dict.fromkeys(row.policy for row in scored)
    tasks: dict[str, dict[str, Any]] = {}
    strata: dict[str, dict[str, list[list[float]]]] = {}
    sources = _sources(scored)
    for policy in [*(p for p in order if p in found), *(p for p in found if p not in order)]:
        for task in dict.fromkeys(row.task for row in scored):
            cell = [row for row in scored if (row.task, row.policy) == (task, policy)]
            if not cell:
                continue
            figures = {"iqm_return_raw": asdict(interquartile_mean([[float(row.score or 0.0) for row in cell]]))}
            if all("score_percent" in row.detail for row in cell):
                percent = [float(row.detail["score_percent"]) for row in cell]
                figures["iqm_score_percent"] = asdict(interquartile_mean([percent]))
                strata.setdefault(sources[task], {}).setdefault(policy, []).append(percent)
            tasks.setdefault(task, {})[policy] = figures
    overall = {
        source: {
            policy: {"iqm_score_percent": asdict(interquartile_mean(samples)), "tasks": len(samples)}
            for policy, samples in columns.items()
            if len(samples) == [*sources.values()].count(source)
        }
        for source, columns in strata.items()
    }
    return {"tasks": tasks, "all": overall} if tasks else {}


def markdown(summary: dict[str, Any]) -> str:
    """A summary of `summarise` as a section of a report; empty if that is."""
    if not summary:
        return ""
    columns = list(dict.fromkeys(policy for cells in summary["tasks"].values() for policy in cells))
    text = [
        "",
        *_ABOUT,
        "",
        f"| offline RL | {' | '.join(columns)} |",
        "|---|" + "---:|" * len(columns),
    ]
    for task, cells in summary["tasks"].items():
        for key in ("iqm_return_raw", "iqm_score_percent"):
            if any(key in cell for cell in cells.values()):
                figures = [_interval(cells.get(column, {}).get(key)) for column in columns]
                text.append(f"| {task}, {key.removeprefix('iqm_')} | {' | '.join(figures)} |")
    joined = {source: cells for source, cells in summary["all"].items() if any(c["tasks"] > 1 for c in cells.values())}
    for source, cells in joined.items():
        figures = [_interval(cells.get(column, {}).get("iqm_score_percent")) for column in columns]
        text.append(f"| all tasks with references of {source}, score_percent | {' | '.join(figures)} |")
    return "\n".join([*text, *(("", _OVER_ALL) if joined else ()), ""])


def by_policy(summary: dict[str, Any]) -> str:
    """A summary of `summarise` with a line for each policy, for many policies on few tasks; empty if that is."""
    if not summary:
        return ""
    text = [*_ABOUT, "", "| task | policy | return_raw | score_percent |", "|---|---|---:|---:|"]
    for task, cells in summary["tasks"].items():
        for policy, cell in cells.items():
            figures = [_interval(cell.get(key)) for key in ("iqm_return_raw", "iqm_score_percent")]
            text.append(f"| {task} | {policy} | {' | '.join(figures)} |")
    return "\n".join([*text, "", ""])


def _trimmed(*samples: np.ndarray, axis: int = -1) -> Any:
    """Mean without the best and the worst quarter of the weight, each sample having the same weight in all.

    Of samples of equal sizes it is scipy's `trim_mean`, which rliable takes: a quarter is rounded down to whole values.
    """
    values = np.concatenate(samples, axis=axis)  # scipy's bootstrap gives the last one
    count = values.shape[-1]
    weights = np.concatenate([np.full(n, 1 / n / len(samples)) for n in (sample.shape[-1] for sample in samples)])
    order = np.argsort(values, axis=-1)
    ends, cut = np.cumsum(weights[order], axis=-1), count // 4 / count
    kept = np.clip(ends, cut, 1 - cut) - np.clip(ends - weights[order], cut, 1 - cut)
    return (np.take_along_axis(values, order, -1) * kept).sum(-1) / (1 - 2 * cut)


def _sources(rows: Sequence[Row]) -> dict[str, str]:
    """Whose references each task's rows are scored against, by task; those without a score are left out."""
    found: dict[str, str] = {}
    for row in rows:
        if "score_percent" in row.detail:
            source = str(row.detail.get("references"))
            if found.setdefault(row.task, source) != source:
                raise DataError(
                    f"{row.task}: scores against the references of {found[row.task]} and of {source} cannot be averaged"
                )
    return found


def _interval(estimate: dict[str, Any] | None) -> str:
    if estimate is None or math.isnan(estimate["value"]):
        return "–"
    digits = 0 if abs(estimate["value"]) >= 100 else 1
    ends = [estimate["low"], estimate["high"]]
    shown = "–" if any(map(math.isnan, ends)) else ", ".join(f"{end:z.{digits}f}" for end in ends)
    return f"{estimate['value']:z.{digits}f} [{shown}]"
