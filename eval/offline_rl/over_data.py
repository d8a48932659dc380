"""Several studies of offline RL in one table: every policy's return as a multiple of the window's, over all data sets.

    python -P -m namm_transfer.eval.offline_rl.over_data --out FOLDER STUDY STUDY ...

Within a data set episodes are paired by their seed, and the ratio is one of mean returns. Data sets have the same
weight and are independent of each other, so that the squares of their intervals' half-widths add up.

Shape letters: D data sets.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from namm_transfer.cli import plain_errors
from namm_transfer.errors import DataError
from namm_transfer.eval.results import OK, RunFolder
from namm_transfer.eval.statistics import Estimate, ratio
from namm_transfer.files import write_atomically

__all__ = ["Returns", "over_data", "read_study", "table"]

Returns = Mapping[str, Mapping[str, float]]
"""Of one study: column -> episode's seed -> return."""


def read_study(folder: Path) -> dict[str, dict[str, float]]:
    """The returns of a study's columns, of all its parts.

    Raises:
        DataError: it holds no rows, or rows of several tasks.
    """
    found: dict[str, dict[str, float]] = {}
    tasks = set()
    for part in sorted(path.parent for path in folder.glob("*/rows.jsonl")):
        for row in RunFolder(part).rows():
            if row.status == OK and row.score is not None:
                tasks.add(row.task)
                found.setdefault(row.policy, {})[row.unit] = row.score
    if len(tasks) != 1:
        raise DataError(
            f"{folder} holds rows of {len(tasks)} tasks ({', '.join(sorted(tasks))}); expected a study's one"
        )
    return found


def over_data(studies: Mapping[str, Returns], base: str = "window", ahead: str = "namm-0.5") -> dict[str, Any]:
    """Ratios to the column `base`, and by how much of it the column `ahead` is ahead of each other.

    Args:
        studies: returns by the data set's name. Columns that are not in all of them are left out.

    Returns:
        {column: {"data": {name: ratio}, "ratio": Estimate, "behind": Estimate}}, the best first.

    Raises:
        DataError: a study lacks `base` or `ahead`, or an episode of one of its columns.
    """
    for name, returns in studies.items():
        for column in (base, ahead):
            if column not in returns:
                raise DataError(f"{name} has no column {column!r}; it has {', '.join(returns)}")
    shared = [c for c in next(iter(studies.values())) if all(c in returns for returns in studies.values())]
    found: dict[str, Any] = {}
    for column in shared:
        ratios = {name: _of_base(returns, base, column) for name, returns in studies.items()}
        found[column] = {
            "data": {name: estimate.value for name, estimate in ratios.items()},
            "ratio": _mean([*ratios.values()]),
            "behind": _mean([_of_base(returns, base, ahead, column) for returns in studies.values()]),
        }
    return dict(sorted(found.items(), key=lambda item: -item[1]["ratio"].value))


def _of_base(returns: Returns, base: str, column: str, less: str | None = None) -> Estimate:
    """A column's return, or what it has more than the column `less`, as a fraction of the base's."""
    units = [*returns[base]]
    taken = {} if less is None else returns[less]
    try:
        values = [returns[column][unit] - (taken[unit] if less else 0.0) for unit in units]
    except KeyError as error:
        raise DataError(f"a column lacks the episode {error}, which {base!r} has") from error
    return ratio(values, [returns[base][unit] for unit in units], units)


def _mean(estimates: Sequence[Estimate]) -> Estimate:
    """Over D data sets, independent of each other."""
    value = math.fsum(one.value for one in estimates) / len(estimates)
    half = math.sqrt(math.fsum(one.half_width**2 for one in estimates)) / len(estimates)
    units, clusters = (sum(getattr(one, key) for one in estimates) for key in ("units", "clusters"))
    return Estimate(value, value - half, value + half, units, clusters)


def table(found: Mapping[str, Any], base: str = "window", ahead: str = "namm-0.5") -> str:
    """Markdown: a row for each column."""
    names = [*next(iter(found.values()))["data"]]
    heads = ["policy", *names, f"mean, of {base}", f"{ahead} ahead by"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for column, row in found.items():
        figures = [f"{value:.2f}" for value in row["data"].values()]
        ends = ["" if column == ahead and key == "behind" else _shown(row[key], key) for key in ("ratio", "behind")]
        lines.append("| " + " | ".join([column, *figures, *ends]) + " |")
    return "\n".join(lines) + "\n"


def _shown(estimate: Estimate, key: str) -> str:
    sign = "+" if key == "behind" else ""
    return f"{estimate.value:{sign}.2f} [{estimate.low:{sign}.2f}, {estimate.high:{sign}.2f}]"


def main(
    studies: Annotated[list[Path], typer.Argument(metavar="STUDY...", help="Folders of `study`.")],
    out: Annotated[Path, typer.Option(help="Folder for table.md and table.json.")],
    base: Annotated[str, typer.Option(help="The column that others are multiples of.")] = "window",
    ahead: Annotated[str, typer.Option(help="The column that others are compared with.")] = "namm-0.5",
) -> None:
    """Every policy's return as a multiple of the window's, over all data sets."""
    out.mkdir(parents=True, exist_ok=True)
    found = over_data({study.name: read_study(study) for study in studies}, base, ahead)
    text = table(found, base, ahead)
    write_atomically(out / "table.md", text)
    plain = {
        column: {**row, "ratio": asdict(row["ratio"]), "behind": asdict(row["behind"])} for column, row in found.items()
    }
    write_atomically(out / "table.json", json.dumps(plain, indent=1) + "\n")
    Console(soft_wrap=True).print(text, markup=False)


if __name__ == "__main__":
    with plain_errors():
        typer.run(main)
