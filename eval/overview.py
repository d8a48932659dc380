"""Finished studies side by side: a table per budget, with a column per study and a row per policy."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from namm_transfer.errors import ConfigError, DataError
from namm_transfer.eval.compare import Line, compare, figure, interval
from namm_transfer.eval.results import OK, RunFolder
from namm_transfer.files import write_atomically

__all__ = ["Studied", "markdown", "overview", "studied"]

AHEAD, BEHIND = "−", "+"
"""Behind the figure of a policy that the reference is ahead of beyond doubt, and of one that is ahead of it."""
FULL = "full"


@dataclass(frozen=True)
class Studied:
    """One study.

    Attributes:
        folder: where its rows and its own table are.
        units, clusters: how many of them the score is a mean over.
        lines: of its columns, compared with the reference.
    """

    folder: Path
    units: int
    clusters: int
    lines: Sequence[Line]


def overview(folders: Sequence[Path], reference: str, out: Path, console: Console) -> None:
    """Write the tables of some studies to a Markdown file, and print them.

    Args:
        reference: the policy whose lead the marks tell of; a name of `namms` in every study.

    Raises:
        DataError: a folder holds no study, or one without the full cache or the reference.
        ConfigError: a folder is named twice.
    """
    places = [folder.resolve() for folder in folders]
    if twice := [str(folder) for folder, place in zip(folders, places, strict=True) if places.count(place) > 1]:
        raise ConfigError(f"expected every study once; got {', '.join(twice)}")
    tables = markdown([studied(folder, reference) for folder in folders], reference, out.parent)
    made = shlex.join(["namm-transfer", "overview", *map(str, folders), "--ahead", reference, "--out", str(out)])
    text = f"{tables}\nMade by `{made}`.\n"
    write_atomically(out, text)
    console.print(text, f"written: {out}", sep="\n", markup=False, highlight=False, soft_wrap=True)


def studied(folder: Path, reference: str) -> Studied:
    """The rows of a study, compared with a policy.

    Raises:
        DataError: the folder holds no study, or one without the full cache or the reference.
    """
    parts = sorted(file.parent for file in folder.glob("*/rows.jsonl"))
    rows = [row for part in parts for row in RunFolder(part).rows()]
    if not rows:
        raise DataError(f"{folder} holds no rows of a study: expected a folder written by `namm-transfer study`")
    try:
        lines = compare(rows, reference)
    except DataError as error:
        raise DataError(f"{folder}: {error}") from error
    known = sorted({_name(line) for line in lines if line.budget is not None})
    if reference not in known:
        raise DataError(f"{folder} has no column {reference!r} at any budget; there are {', '.join(known)}")
    full = [row for row in rows if row.policy == FULL and row.status == OK]
    return Studied(folder, len(full), len({row.cluster for row in full}), lines)


def markdown(studies: Sequence[Studied], reference: str, beside: Path) -> str:
    """A table per budget of the reference; links to the studies' own tables are relative to the folder `beside`."""
    parts = [
        f"Fractions of what the full cache scores; of `{reference}` with its 95 % interval, over clusters. {AHEAD}: "
        f"`{reference}` is ahead of this policy beyond doubt (paired by unit, 95 %); {BEHIND}: it is behind."
    ]
    found = {budget: [_at(study, budget) for study in studies] for budget in _budgets(studies, reference)}
    for budget, columns in found.items():
        shown = [(study, lines) for study, lines in zip(studies, columns, strict=True) if reference in lines]
        names = sorted({name for _, lines in shown for name in lines} - {reference})
        links = [f"[{study.folder.name}]({_link(study, beside)})" for study, _ in shown]
        table = [["", *links], ["---", *["---:"] * len(links)]]
        table.append(["units / clusters", *(f"{study.units} / {study.clusters}" for study, _ in shown)])
        table.append(["score of the full cache", *(figure(_full(study).score.value) for study, _ in shown)])
        table.append([f"**{reference}**", *(interval(lines[reference].of_full, sign="") for _, lines in shown)])
        table += [[name, *(_cell(lines.get(name)) for _, lines in shown)] for name in names]
        parts += [f"## {budget:g} of the tokens", "\n".join(f"| {' | '.join(cells)} |" for cells in table)]
    return "\n\n".join(parts) + "\n"


def _budgets(studies: Sequence[Studied], reference: str) -> list[float]:
    lines = [line for study in studies for line in study.lines]
    return sorted({line.budget for line in lines if line.budget is not None and _name(line) == reference})


def _at(study: Studied, budget: float) -> dict[str, Line]:
    return {_name(line): line for line in study.lines if line.budget == budget}


def _full(study: Studied) -> Line:
    return next(line for line in study.lines if line.policy == FULL)


def _link(study: Studied, beside: Path) -> str:
    return Path(os.path.relpath(study.folder / "table.md", beside)).as_posix()


def _cell(line: Line | None) -> str:
    if line is None:
        return ""
    mark = "" if line.ahead is None else AHEAD if line.ahead.low > 0 else BEHIND if line.ahead.high < 0 else ""
    return figure(line.of_full.value) + mark


def _name(line: Line) -> str:
    """The policy without its budget."""
    return line.policy.removesuffix(f"-{line.budget}")
