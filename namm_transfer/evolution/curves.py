"""How an evolution went: `progress.csv`, a line a generation, and `curves.png`; `descent.png` before that."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from namm_transfer.evolution.journal import Journal
from namm_transfer.files import replacing

__all__ = ["draw_curves"]

_COLUMNS = ("generation", "samples", "best", "mean", "full", "kept", "agreement", "sigma", "seconds")


def draw_curves(journal: Journal, folder: Path) -> None:
    """Write the files anew from the journal; nothing of what has not begun."""
    if steps := journal.of("descent"):
        _plot_descent(steps, folder / "descent.png")
    rows = [_row(record) for record in journal.of("generation")]
    if not rows:
        return
    with replacing(folder / "progress.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    _plot(journal, rows, folder / "curves.png")


def _row(record: dict[str, Any]) -> dict[str, Any]:
    found = {
        "best": round(max(record["difference"]), 4),
        "mean": round(float(np.mean(record["difference"])), 4),
        "kept": round(float(np.mean(record["kept"])), 4),
    }
    return {name: found.get(name, record.get(name)) for name in _COLUMNS}


def _plot_descent(steps: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    loss, kept = figure.subplots(2, sharex=True)
    width = max(1, len(steps) // 15)
    for budget in steps[0]["difference"]:
        found = np.array([step["difference"][budget] for step in steps])
        smooth = np.convolve(found, np.ones(width) / width, mode="valid")
        (line,) = loss.plot(np.arange(len(smooth)) + width, smooth, label=budget)
        loss.plot(np.arange(len(found)) + 1, found, lw=0.5, alpha=0.4, color=line.get_color())
        kept.plot(np.arange(len(found)) + 1, [step["kept"][budget] for step in steps], lw=0.8)
    loss.set_ylabel("nats a token against the full cache")
    kept.set_ylabel("kept")
    kept.set_xlabel(f"step (thick: means of {width})")
    loss.legend(fontsize="small")
    for axes in (loss, kept):
        axes.grid(alpha=0.3)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110)


def _plot(journal: Journal, rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure  # slow to import, and no backend is touched this way

    generations = [row["generation"] for row in rows]
    figure = Figure(figsize=(8, 9), layout="constrained")
    loss, kept, noise = figure.subplots(3, sharex=True)
    loss.plot(generations, [row["mean"] for row in rows], lw=0.8, label="candidates, mean")
    loss.plot(generations, [row["best"] for row in rows], lw=0.8, label="candidates, best")
    kept.plot(generations, [row["kept"] for row in rows], lw=0.8, label="candidates, mean")
    for event, name in (("validation", "validation, mean"), ("validation_of_average", "validation, average of means")):
        records = journal.of(event)
        validated = [record["generation"] for record in records]
        loss.plot(validated, [record["difference"] for record in records], marker=".", label=name)
        kept.plot(validated, [record["kept"] for record in records], marker=".", label=name)
    noise.plot(generations, [row["agreement"] for row in rows], lw=0.8, label="agreement of two halves")
    noise.plot(generations, [row["sigma"] for row in rows], label="sigma")
    loss.set_ylabel("nats a token against the full cache")
    kept.set_ylabel("kept by threshold")
    noise.set_xlabel("generation")
    for axes in (loss, kept, noise):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110)
