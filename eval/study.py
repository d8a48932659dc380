"""NAMMs against the rules over budgets, on one task: rows, a table, curves, and the command that made them.

The rules do not depend on a NAMM. They are run first and kept in a folder of their own, as each NAMM's rows are, so
that another NAMM joins a finished study for its own price.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from namm_transfer.errors import BudgetError, ConfigError
from namm_transfer.eval.compare import THRESHOLD, as_json, compare, curves, markdown
from namm_transfer.eval.offline_rl import report as offline_rl
from namm_transfer.eval.results import Row
from namm_transfer.eval.runner import MATCHED, REFERENCE, Run
from namm_transfer.eval.task import BASELINES
from namm_transfer.eval.transfer import Interrupted
from namm_transfer.files import write_atomically
from namm_transfer.scoring import check_budget

__all__ = [
    "columns_matched",
    "columns_of_namm",
    "columns_of_rules",
    "columns_of_variant",
    "settings_of_namm",
    "study",
]


def columns_of_rules(rules: Sequence[str], budgets: Sequence[float]) -> dict[str, dict[str, Any]]:
    """The full cache, the baselines of tasks that have them, and every rule at every budget."""
    ranked = {f"{rule}-{budget}": {"name": rule, "budget": budget} for budget in budgets for rule in rules}
    return {"full": {"name": "full"}, **{name: {"name": name} for name in BASELINES}, **ranked}


def columns_of_variant(
    name: str, variant: Mapping[str, Any], rules: Sequence[str], budgets: Sequence[float]
) -> dict[str, dict[str, Any]]:
    """The variant's rules, by default all, at every budget with its options of a policy, under names that say so.

    Raises:
        ConfigError: it is none.
    """
    options = dict(variant) if isinstance(variant, Mapping) else {}
    chosen = options.pop("rules", rules)
    if not options or not chosen or isinstance(chosen, str) or {"name", "budget"} & {*options}:
        raise ConfigError(
            f"variants.{name} is {variant!r}; expected options of a policy but its name and budget, and perhaps the "
            "rules that get them, as in {rules: [h2o, tova], kinds: 3}"
        )
    columns = [(rule, budget) for budget in budgets for rule in chosen]
    return {f"{rule}_{name}-{budget}": {"name": rule, "budget": budget, **options} for rule, budget in columns}


def settings_of_namm(namm: str | Mapping[str, Any]) -> dict[str, Any]:
    """A policy's settings, from a name or some of them.

    The heads of a layer share a budget: a NAMM's scores mean the same in all of them, or one threshold could not serve.
    """
    return {"name": "namm", "allocation": "per_layer", **({"namm": namm} if isinstance(namm, str) else namm)}


def columns_of_namm(
    name: str, namm: str | Mapping[str, Any], budgets: Sequence[float], thresholds: Sequence[float] = ()
) -> dict[str, dict[str, Any]]:
    """A NAMM by threshold, at zero and at others, and by rank at every budget; by rank alone if a budget is divided."""
    settings = settings_of_namm(namm)
    ranked = {f"{name}-{budget}": settings | {"budget": budget} for budget in budgets}
    if settings.get("kinds", 1) != 1 or settings.get("segment"):  # of no effect on a threshold
        return ranked
    moved = {f"{name}{THRESHOLD}{threshold}": settings | {"threshold": threshold} for threshold in thresholds}
    return {name: settings, **moved, **ranked}


def columns_matched(rules: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Every rule at the budget that the reference was measured to keep by threshold."""
    return {f"{rule}-{MATCHED}": {"name": rule, "budget": MATCHED} for rule in rules}


def study(config: Mapping[str, Any], out: Path, command: Sequence[str], console: Console) -> list[Row]:
    """Run what is missing, and write `table.md`, `table.json` and `curves.png`.

    Args:
        config: resolved; `task`, `namms` (name of the column to packaged name, folder or Hub id, or to options of the
            policy), `thresholds`, `rules`, `variants` (suffix of the columns to options of the policy, and `rules`),
            `ahead` (a name of `namms`), `matched`, `budgets`, `seed`, `executor`.
        out: folder; rows go to a folder in it for the rules and one for each NAMM.
        command: how to run this again, as overrides of `study`.
        console: shows the progress and the table.

    Raises:
        ConfigError: settings that do not fit.
        Interrupted: on Ctrl-C; what is finished is kept.
    """
    budgets, namms = config["budgets"], config["namms"]
    for budget in budgets:
        if isinstance(check_budget(budget), int):
            raise BudgetError(f"budgets are fractions of the tokens seen; got {budget!r}")
    variants = {f"rules_{name}": (name, variant) for name, variant in config["variants"].items()}
    taken = ("full", *BASELINES, "rules", *variants)
    for key, names in (("namms", namms), ("variants", config["variants"])):
        if bad := [name for name in names if not re.fullmatch(r"\w+", name) or (key == "namms" and name in taken)]:
            raise ConfigError(
                f"{key} has the columns {bad}; expected names of letters, digits and underscores of their own"
            )
    if namms and config["ahead"] not in namms:
        raise ConfigError(f"ahead is {config['ahead']!r}; expected one of the columns {', '.join(namms)} of namms")
    parts = {"rules": columns_of_rules(config["rules"], budgets)}
    parts |= {part: columns_of_variant(*variant, config["rules"], budgets) for part, variant in variants.items()}
    parts |= {name: columns_of_namm(name, namm, budgets, config["thresholds"]) for name, namm in namms.items()}
    if REFERENCE in parts.get(REFERENCE, {}) and config["matched"]:  # it has a threshold
        parts[REFERENCE] |= columns_matched(config["rules"])
    if twice := [name for name, times in Counter(chain.from_iterable(parts.values())).items() if times > 1]:
        raise ConfigError(f"{', '.join(twice)}: more than one column would have this name; rename those of namms")
    shared = {key: config[key] for key in ("seed", "executor")}
    runs = {
        name: Run({**shared, "tasks": {"task": config["task"]}, "policies": columns}, out / name)
        for name, columns in parts.items()
    }
    rows: list[Row] = []
    for run in runs.values():
        try:
            run(console)
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted; what is finished is kept in {out}: the same command goes on") from None
        rows += run.folder.rows()
    _write(rows, config, shlex.join(["namm-transfer", "study", *command]), out, console)
    return rows


def _write(rows: Sequence[Row], config: Mapping[str, Any], command: str, out: Path, console: Console) -> None:
    lines, metric, name = compare(rows, config["ahead"]), rows[0].metric, rows[0].task
    full = [row for row in rows if row.policy == "full"]
    model = config["task"].get("model", {})
    about = (
        f"{name}: {len({row.unit for row in full})} units in {len({row.cluster for row in full})} clusters, host "
        f"{model.get('host') or model.get('path')}, update interval {model.get('update_interval')}. Intervals: 95 %, "
        "paired by unit, clustered. No budget: by threshold."
    )
    table = markdown(lines, metric, config["ahead"])
    episodes = offline_rl.summarise(rows, [line.policy for line in lines])
    text = f"{about}\n\n{table}\n{offline_rl.by_policy(episodes)}![curves](curves.png)\n\nMade by `{command}`.\n"
    write_atomically(out / "table.md", text)
    content = {"command": command, "about": about, "lines": as_json(lines), "offline_rl": episodes or None}
    write_atomically(out / "table.json", json.dumps(content, indent=1) + "\n")
    curves(lines, name, metric, out / "curves.png")
    console.print(table, f"written: {out / 'table.md'}, {out / 'curves.png'}", sep="\n")
