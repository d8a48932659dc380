"""A NAMM against the rules on held-out essays, at equal budgets: rows, a table, and the command that made them.

    python -P -m namm_transfer.eval.language.heldout --namm default --out docs/results/language

The rules do not depend on the NAMM, so they are run first and kept; both runs resume from their rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from namm_transfer.configs import composed
from namm_transfer.eval.language.compare import as_json, compare, markdown
from namm_transfer.eval.results import Row
from namm_transfer.eval.runner import Run
from namm_transfer.files import write_atomically

__all__ = ["RULES", "columns_of_namm", "columns_of_rules", "heldout", "write_table"]

BUDGETS = (0.15, 0.25, 0.35, 0.5, 0.7)
RULES = ("h2o", "key_norm", "tova", "snapkv", "streaming", "random")


def columns_of_rules(budgets: Sequence[float] = BUDGETS) -> dict[str, dict[str, Any]]:
    """The full cache, and every rule at every budget."""
    rules = {f"{rule}-{budget}": {"name": rule, "budget": budget} for budget in budgets for rule in RULES}
    return {"full": {"name": "full"}, **rules}


def columns_of_namm(namm: str, budgets: Sequence[float] = BUDGETS) -> dict[str, dict[str, Any]]:
    """A NAMM by threshold, and by rank at every budget."""
    ranked = {f"namm-{budget}": {"name": "namm", "namm": namm, "budget": budget} for budget in budgets}
    return {"namm": {"name": "namm", "namm": namm}, **ranked}


def heldout(
    namm: str | None, out: Path, budgets: Sequence[float], overrides: Sequence[str], console: Console
) -> list[Row]:
    """Run what is missing, and write `table.md` and `table.json`.

    Args:
        namm: name or folder; None runs the rules alone and writes no table.
        out: folder; the rows go to `rules/` and `namm/` in it.
        budgets: fractions of the tokens seen.
        overrides: of the command `eval`, such as `task.repeats=2`.
        console: shows the progress and the table.
    """
    settings = composed("eval", ["task=language/essays", *overrides])
    rows = _run(settings, columns_of_rules(budgets), out / "rules", console)
    if namm is None:
        return rows
    rows += _run(settings, columns_of_namm(namm, budgets), out / "namm", console)
    command = ["python -P -m namm_transfer.eval.language.heldout", f"--namm {namm}", f"--out {out}"]
    command += [*(f"--budget {b}" for b in budgets if tuple(budgets) != BUDGETS), *overrides]
    console.print(write_table(rows, settings["task"], " ".join(command), out))
    return rows


def write_table(rows: Sequence[Row], task: Mapping[str, Any], command: str, out: Path) -> str:
    """Write `table.md` and `table.json` into a folder, and return the former.

    A column that is not finished (the run was interrupted) is left out.
    """
    units = {row.unit for row in rows if row.policy == "full"}
    found = {policy: {row.unit for row in rows if row.policy == policy} for policy in {row.policy for row in rows}}
    rows = [row for row in rows if found[row.policy] == units]
    lines = compare(rows)
    about = (
        f"{len(units)} samples of {len({row.cluster for row in rows})} held-out essays, "
        f"{task['context_tokens']} tokens before the first question, update interval "
        f"{task['model']['update_interval']}, host {task['model']['path']}. Loss: mean log-likelihood of the answer "
        "tokens minus the full cache's on the same sample. Intervals: 95 %, paired by sample, clustered by essay."
    )
    text = f"{about}\n\n{markdown(lines)}\nMade by `{command}`.\n"
    write_atomically(out / "table.md", text)
    content = {"command": command, "about": about, "lines": as_json(lines)}
    write_atomically(out / "table.json", json.dumps(content, indent=1) + "\n")
    return text


def _run(settings: Mapping[str, Any], columns: Mapping[str, Any], out: Path, console: Console) -> list[Row]:
    shared = {key: settings[key] for key in ("seed", "executor")}
    run = Run({**shared, "tasks": {"language": settings["task"]}, "policies": columns}, out)
    run(console)
    return run.folder.rows()


def main(
    out: Annotated[Path, typer.Option(help="Folder of the rows and the table.")],
    namm: Annotated[str | None, typer.Option(help="Packaged name or folder; without it, the rules alone.")] = None,
    budget: Annotated[list[float] | None, typer.Option(help="Fraction of the tokens seen; may be repeated.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
) -> None:
    """A NAMM against the rules on held-out essays."""
    heldout(namm, out, budget or BUDGETS, overrides or [], Console())


if __name__ == "__main__":
    typer.run(main)
