"""Finished studies side by side: a table per budget, with a column per study and a row per policy."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from rich.console import Console

from namm_transfer.errors import ConfigError, DataError
from namm_transfer.eval.compare import MATCHED_END, Line, compare, figure, interval
from namm_transfer.eval.results import RunFolder
from namm_transfer.eval.task import BASELINES
from namm_transfer.files import write_atomically

__all__ = ["Studied", "markdown", "overview", "studied"]

WORSE, BETTER = "−", "+"
"""Marks after a policy's figure: the reference is ahead of it, or it is ahead of the reference."""
FULL = "full"


@dataclass(frozen=True)
class Studied:
    """One study.

    Attributes:
        folder: where its rows and its own table are.
        metric: of its score.
        lines: its columns, compared with the reference; but for those at a budget that a NAMM was measured to keep.
    """

    folder: Path
    metric: str
    lines: Sequence[Line]


def overview(folders: Sequence[Path], reference: str, out: Path, console: Console) -> None:
    """Write the tables of some studies to a Markdown file, and print them.

    Args:
        reference: the policy whose lead the marks tell of, which every study has at some budget.

    Raises:
        DataError: a folder holds no study, an unfinished one, or one without the full cache or the reference.
        ConfigError: a folder is named twice.
    """
    times = Counter(folder.resolve() for folder in folders)
    if twice := [str(folder) for folder in folders if times[folder.resolve()] > 1]:
        raise ConfigError(f"expected every study once; got {', '.join(twice)}")
    tables = markdown([studied(folder, reference) for folder in folders], reference, out.parent)
    made = shlex.join(["namm-transfer", "overview", *map(str, folders), "--ahead", reference, "--out", str(out)])
    text = f"{tables}\nMade by `{made}`.\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, text)
    console.print(text, f"written: {out}", sep="\n", markup=False, highlight=False, soft_wrap=True)


def studied(folder: Path, reference: str) -> Studied:
    """The rows of a study, compared with a policy.

    Raises:
        DataError: the folder holds no study, an unfinished one, or one without the full cache or the reference.
    """
    runs = [RunFolder(file.parent) for file in sorted(folder.glob("*/config.yaml"))]
    rows = [row for run in runs for row in run.rows()]
    if not rows:
        raise DataError(f"{folder} holds no rows of a study: expected a folder written by `namm-transfer study`")
    wanted = {name for run in runs for name in run.config().get("policies") or {}}
    if lacking := sorted(wanted - {row.policy for row in rows} - {*BASELINES}):
        raise DataError(f"{folder} is not finished: there are no rows of {', '.join(lacking)}")
    try:
        lines = compare([row for row in rows if not row.policy.endswith(MATCHED_END)], reference, FULL)
    except DataError as error:
        raise DataError(f"{folder}: {error}") from error
    known = sorted({line.name for line in lines if line.budget is not None})
    if reference not in known:
        raise DataError(f"{folder} has no column {reference!r} at any budget; there are {', '.join(known)}")
    return Studied(folder, rows[0].metric, lines)


def markdown(studies: Sequence[Studied], reference: str, beside: Path) -> str:
    """A table per budget of the reference; links to the studies' own tables are relative to the folder `beside`."""
    parts = [
        f"Fractions of what the full cache scores (where a score is a log-likelihood: of its token accuracy), of "
        f"`{reference}` with their 95 % intervals. {WORSE}: `{reference}` is ahead of this policy, {BETTER}: behind "
        "it, each comparison by itself in scores, paired by unit and clustered, at 95 %. Blank: not in the study."
    ]
    found = {budget: [_at(study, budget) for study in studies] for budget in _budgets(studies, reference)}
    links = [f"[{label}]({_link(study, beside)})" for label, study in zip(_labels(studies), studies, strict=True)]
    for budget, columns in found.items():
        shown = [number for number, lines in enumerate(columns) if reference in lines]
        names = sorted({name for number in shown for name in columns[number]} - {reference})
        scores = [_full(studies[number]).score for number in shown]
        table = [
            ["", *(links[number] for number in shown)],
            ["---", *["---:"] * len(shown)],
            ["units / clusters", *(f"{score.units} / {score.clusters}" for score in scores)],
            ["metric", *(studies[number].metric for number in shown)],
            ["score of the full cache", *(figure(score.value) for score in scores)],
            [f"**{reference}**", *(interval(columns[number][reference].of_full, sign="") for number in shown)],
            *([name, *(_cell(columns[number].get(name)) for number in shown)] for name in names),
        ]
        parts += [f"## {budget:g} of the tokens", "\n".join(f"| {' | '.join(cells)} |" for cells in table)]
    return "\n\n".join(parts) + "\n"


def _budgets(studies: Sequence[Studied], reference: str) -> list[float]:
    lines = [line for study in studies for line in study.lines]
    return sorted({line.budget for line in lines if line.budget is not None and line.name == reference})


def _at(study: Studied, budget: float) -> dict[str, Line]:
    return {line.name: line for line in study.lines if line.budget == budget}


def _full(study: Studied) -> Line:
    return next(line for line in study.lines if line.policy == FULL)


def _labels(studies: Sequence[Studied]) -> list[str]:
    """Names of the studies' folders; where two are the same, with the folders above."""
    places = [study.folder.resolve() for study in studies]
    labels = [place.name for place in places]
    if len({*labels}) < len(labels):
        above = os.path.commonpath([place.parent for place in places])
        labels = [place.relative_to(above).as_posix() for place in places]
    return [label.replace("|", r"\|") for label in labels]


def _link(study: Studied, beside: Path) -> str:
    return quote(Path(os.path.relpath(study.folder / "table.md", beside)).as_posix())


def _cell(line: Line | None) -> str:
    if line is None:
        return ""
    mark = "" if line.ahead is None else WORSE if line.ahead.low > 0 else BETTER if line.ahead.high < 0 else ""
    return " ".join(filter(None, [figure(line.of_full.value), mark]))
