"""The table and the picture of what memories keep of episodes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from namm_transfer.eval.offline_rl.agent import KINDS
from namm_transfer.files import replacing

__all__ = ["draw", "table"]


def table(found: Mapping[str, Any]) -> str:
    """What `measure_kept` returns, as a Markdown table with its explanation."""
    heads = ["policy", "return", "kept", *(f"{kind}s" for kind in KINDS), "age of kept", "age of seen"]
    heads += ["near falls", "kept before", "kept after"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for name, row in found.items():
        cells = [_shown(row["return_raw"], ".0f"), _shown(row["kept_fraction"], ".2f")]
        cells += [_shown(row["share_of_kept_by_kind"][kind], ".2f") for kind in KINDS]
        cells += [str(row[key]["0.5"]) for key in ("age_of_kept", "age_of_seen")]
        near = row["near_falls"]
        cells.append("–" if near is None else str(near["count"]))
        for part in ("before", "after"):
            cells.append("–" if near is None else _shown(near["kept_against_others_as_old"][part], ".2f"))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    about = [
        "",
        "Counted just after each decision, over layers and heads. Kept: share of the tokens seen; returns, states,",
        "actions: shares of the tokens kept (a third each if kinds made no difference); ages: medians, in timesteps;",
        "kept before and after a near fall: against all tokens of the same age. 95 % intervals, an episode a cluster.",
        "",
    ]
    return "\n".join([*lines, *about])


def draw(found: Mapping[str, Any], around: int, path: Path) -> None:
    """Four panels: kinds, ages, around near falls, and the return over time."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    (kinds, ages), (falls, returns) = figure.subplots(2, 2)
    names, left = list(found), np.zeros(len(found))
    for kind in KINDS:
        shares = np.array([found[name]["share_of_kept_by_kind"][kind]["value"] for name in names])
        kinds.barh(names, shares, left=left, label=f"{kind}s")
        left = left + shares
    kinds.invert_yaxis()
    kinds.set(title="kinds of the tokens kept", xlabel="share of the tokens kept", xlim=(0, 1))
    kinds.legend(ncols=3, fontsize="small", loc="lower right")
    offsets = np.arange(-around, around + 1)
    for name in names:
        row = found[name]
        by_age = np.array(row["kept_fraction_by_age"])
        ages.plot(np.arange(len(by_age)) + 1, by_age, label=name)
        returns.plot(row["return_so_far"], label=name)
        if row["near_falls"] is not None:
            ratios = [math.nan if value is None else value for value in row["near_falls"]["by_offset"]]
            falls.plot(offsets, ratios, label=name)
    ages.set(title="kept fraction by age", xlabel="age in timesteps, from this on", xscale="log", ylim=(0, 1.02))
    falls.axvline(0, color="grey", linewidth=0.8)
    falls.axhline(1, color="grey", linewidth=0.8)
    falls.set(title="around near falls", xlabel="timesteps from the near fall", ylabel="kept, against others as old")
    returns.set(title="return over time, mean of the episodes", xlabel="timestep", ylabel="return_raw so far")
    for axes in (ages, falls, returns):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small") if axes.get_lines() else None
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110)


def _shown(estimate: Mapping[str, Any], form: str) -> str:
    value, low, high = (float(estimate[key]) for key in ("value", "low", "high"))
    if math.isnan(value):
        return "–"
    return f"{value:{form}}" if math.isnan(low) else f"{value:{form}} [{low:{form}}, {high:{form}}]"
