"""The main job: every task of a configuration under every policy, then one table, all in one results folder."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from namm_transfer.errors import ConfigError
from namm_transfer.eval.report import Summary, report
from namm_transfer.eval.runner import Run

__all__ = ["Interrupted", "results_folder", "transfer"]


class Interrupted(KeyboardInterrupt):
    """A run was interrupted; the message says what is kept and how to go on."""


def transfer(config: Mapping[str, Any], out: Path, console: Console, command: str = "transfer") -> Summary:
    """Run (or go on with) a configuration in the folder `out`, and report.

    Args:
        config: resolved; either `tasks` and `policies` by name, or one `task` and one `policy`.

    Raises:
        NammTransferError: bad settings, weights, videos or results; rows written before stay.
        Interrupted: on Ctrl-C.
    """
    config = {key: value for key, value in config.items() if key != "out"}
    if "task" in config:
        task, policy = config.pop("task"), config.pop("policy")
        for key, settings in (("task", task), ("policy", policy)):
            if not isinstance(settings, Mapping) or "name" not in settings:
                raise ConfigError(f"{key} is {settings!r}; expected settings with a name")
        config |= {"tasks": {task["name"]: task}, "policies": {policy["name"]: policy}}
    run = Run(config, out)
    if run.finished:
        console.print(f"{run.finished} of {len(run.plan)} results are in {out} already")
    try:
        run(console)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted: {run.finished} of {len(run.plan)} results are kept; "
            f"go on with: namm-transfer {command} --resume {out}"
        ) from None
    summary = report(run.folder, console)
    console.print(f"results: {out}")
    return summary


def results_folder(out: str | None, command: str) -> Path:
    """The folder asked for, or a new one named after command and time."""
    return Path(out) if out else Path("results") / f"{command}-{datetime.datetime.now():%Y-%m-%d-%H%M%S}"
