"""What a memory keeps of an episode: which kinds of tokens, how old they are, and what of the time around near falls.

    python -P -m namm_transfer.eval.offline_rl.kept --out FOLDER task=offline_rl/hopper task.episodes=8

The NAMM of the column `namm` goes by its threshold, the rules by the budget that it was measured to keep, as in a
study; with `--budget`, all go by rank at that. All play the same environment seeds. Everything is counted just after
each decision, over all layers and heads.

Shape letters: L layers, K KV heads, S tokens seen, T timesteps, n episodes.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console

from namm_transfer.cli import plain_errors
from namm_transfer.configs import composed
from namm_transfer.errors import ConfigError, DataError
from namm_transfer.eval import statistics
from namm_transfer.eval.executor import use_executor
from namm_transfer.eval.offline_rl.agent import KINDS, WatchedEpisode
from namm_transfer.eval.offline_rl.falls import near_falls
from namm_transfer.eval.offline_rl.kept_report import draw, table
from namm_transfer.eval.provenance import record
from namm_transfer.eval.results import OK, Row
from namm_transfer.eval.rl_tasks import Episodes
from namm_transfer.eval.runner import REFERENCE, matched_budget
from namm_transfer.eval.study import settings_of_namm
from namm_transfer.eval.workers import build_policy, build_task
from namm_transfer.files import write_atomically

__all__ = ["Kept", "kept_of", "measure_kept"]

AROUND = 20
"""Timesteps before and after a near fall that are looked at."""
UNREAD = {"out": "--out", "budgets": "--budget", "matched": "--budget"} | dict.fromkeys(
    ("thresholds", "variants", "ahead"), ""
)
"""Settings of a study that mean nothing here, and the option to give instead."""
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass
class Kept:
    """Counts of tokens just after decisions, of one episode.

    Attributes:
        kinds: kept and seen, [2, 3], kinds in the order of `KINDS`.
        ages: kept and seen by age in timesteps, [2, T].
        around: of the timesteps around near falls, kept and what tokens of their ages are kept of on the average:
            [2, 2 · AROUND + 1], the moment of the near fall in the middle.
        near_falls: their number; None where the environment knows no falls.
        fell: the episode ended so.
        rewards: [T].
    """

    kinds: NDArray[np.float64]
    ages: NDArray[np.float64]
    around: NDArray[np.float64]
    near_falls: int | None
    fell: bool
    rewards: NDArray[np.float64]


def kept_of(watched: Sequence[WatchedEpisode], env_id: str) -> list[Kept]:
    """Count, episode by episode.

    Raises:
        DataError: no decision was taken in any episode.
    """
    if not any(one.decisions for one in watched):
        raise DataError("no episode was long enough for a decision: nothing could be evicted; lower the interval")
    moments = [near_falls(one.episode, env_id) for one in watched]
    counted = []
    for one, when in zip(watched, moments, strict=True):
        number, episode = None if when is None else len(when), one.episode
        around = np.zeros((2, 2 * AROUND + 1))
        counted.append(Kept(*_count(one), around, number, episode.terminated, episode.rewards))
    longest = max(len(one.rewards) for one in counted)
    total = np.zeros((2, longest))
    for kept in counted:
        total[:, : kept.ages.shape[1]] += kept.ages
    usual = np.divide(total[0], total[1], out=np.zeros(longest), where=total[1] > 0)  # kept fraction by age
    for one, kept, when in zip(watched, counted, moments, strict=True):
        kept.around = _around(one, when or [], usual)
    return counted


def _count(watched: WatchedEpisode) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    kinds, ages = np.zeros((2, len(KINDS))), np.zeros((2, watched.episode.length))
    for kept, timestep, now in _decisions(watched):
        heads, age = np.prod(watched.shape), now - timestep
        of_kind = np.arange(len(kept)) % len(KINDS)
        for row, weights in enumerate((kept, np.full(len(kept), heads))):
            kinds[row] += np.bincount(of_kind, weights, len(KINDS))
            ages[row] += np.bincount(age, weights, ages.shape[1])
    return kinds, ages


def _around(watched: WatchedEpisode, moments: Sequence[int], usual: NDArray[np.float64]) -> NDArray[np.float64]:
    """As of `Kept`; only decisions that come after all of the time around a near fall count."""
    found = np.zeros((2, 2 * AROUND + 1))
    for kept, timestep, now in _decisions(watched):
        expected = np.prod(watched.shape) * usual[now - timestep]
        for moment in moments:
            if moment + AROUND > timestep[-1]:
                continue
            near = np.abs(timestep - moment) <= AROUND
            for row, weights in enumerate((kept, expected)):
                found[row] += np.bincount(timestep[near] - moment + AROUND, weights[near], found.shape[1])
    return found


def _decisions(watched: WatchedEpisode) -> list[tuple[NDArray[np.int64], NDArray[np.int64], int]]:
    """Of each decision: how many heads keep each token [S], the tokens' timesteps [S], and the newest one."""
    found = []
    for kept in watched.decisions:
        timestep = np.arange(kept.shape[-1]) // len(KINDS)
        found.append((kept.sum(axis=(0, 1)), timestep, int(timestep[-1])))
    return found


def summarise(counted: Sequence[Kept]) -> dict[str, Any]:
    """Shares with their intervals, an episode being a cluster; ages in timesteps."""
    clusters = list(range(len(counted)))
    kinds = np.stack([one.kinds for one in counted])  # [n, 2, 3]
    around = np.stack([one.around for one in counted])
    length = max(one.ages.shape[1] for one in counted)
    ages = np.sum([np.pad(one.ages, ((0, 0), (0, length - one.ages.shape[1]))) for one in counted], axis=0)
    falls = [one.near_falls for one in counted]
    shares = {
        kind: asdict(statistics.ratio(kinds[:, 0, i], kinds[:, 0].sum(1), clusters)) for i, kind in enumerate(KINDS)
    }
    fractions = np.divide(ages[0], ages[1], out=np.zeros(length), where=ages[1] > 0)
    found: dict[str, Any] = {
        "episodes": len(counted),
        "return_raw": asdict(statistics.mean([float(one.rewards.sum()) for one in counted], clusters)),
        "fell": sum(one.fell for one in counted),
        "kept_fraction": asdict(statistics.ratio(kinds[:, 0].sum(1), kinds[:, 1].sum(1), clusters)),
        "share_of_kept_by_kind": shares,
        "age_of_kept": dict(zip(map(str, QUANTILES), _quantiles(ages[0]), strict=True)),
        "age_of_seen": dict(zip(map(str, QUANTILES), _quantiles(ages[1]), strict=True)),
        "kept_fraction_by_age": np.round(fractions, 5).tolist(),
        "return_so_far": _curve([one.rewards for one in counted]),
        "near_falls": None,
    }
    if None not in falls:
        # An episode without a near fall tells nothing here: it must not count among those that bear the interval.
        told = around[around.any((1, 2))]
        parts = {"before": told[:, :, :AROUND], "after": told[:, :, AROUND:]}
        ratios = {
            name: statistics.ratio(part[:, 0].sum(1), part[:, 1].sum(1), clusters[: len(told)])
            for name, part in parts.items()
        }
        found["near_falls"] = {
            "count": sum(number or 0 for number in falls),
            "kept_against_others_as_old": {name: asdict(value) for name, value in ratios.items()},
            "by_offset": _ratios(*around.sum(0)),
        }
    return found


def _quantiles(weights: NDArray[np.float64]) -> list[int]:
    reached = np.cumsum(weights) / max(weights.sum(), 1)
    return [int(np.searchsorted(reached, quantile)) for quantile in QUANTILES]


def _ratios(top: NDArray[np.float64], bottom: NDArray[np.float64]) -> list[float | None]:
    return [round(float(a / b), 4) if b > 0 else None for a, b in zip(top, bottom, strict=True)]


def _curve(rewards: Sequence[NDArray[np.float64]]) -> list[float]:
    """Mean return up to each timestep; an episode that has ended stays at what it earned."""
    total = np.zeros(max(map(len, rewards)))
    for one in rewards:
        earned = np.cumsum(one)
        total += np.pad(earned, (0, len(total) - len(earned)), mode="edge")
    return np.round(total / len(rewards), 2).tolist()


def measure_kept(config: Mapping[str, Any], console: Console, budget: float | None = None) -> dict[str, Any]:
    """Play the episodes of a task under each NAMM, then under each rule, and sum up what was kept.

    Args:
        config: resolved, as of `study`; its budgets are not read.
        console: says what is played.
        budget: of every policy; None: NAMMs go by their threshold, the rules by what the column `namm` keeps.

    Raises:
        ConfigError: the task plays no episodes, there is no column `namm`, or a rule is unknown.
        DataError: no decision was taken.
    """
    task = build_task(config["task"])
    if not isinstance(task, Episodes):
        raise ConfigError(f"{task.name} plays no episodes: choose a task of offline_rl")
    if REFERENCE not in config["namms"]:
        raise ConfigError(f"namms needs a column {REFERENCE!r}: the rules get its budget")
    for rule in config["rules"]:
        build_policy({"name": rule, "budget": budget or 0.5})  # what is wrong with it is said before anything is played
    units = task.units(config["seed"])
    columns = {name: settings_of_namm(namm) | {"budget": budget} for name, namm in config["namms"].items()}
    for settings in columns.values():
        build_policy(settings)  # likewise
    columns |= {rule: {"name": rule} for rule in config["rules"]}
    found: dict[str, Any] = {}
    matched = 1.0
    for name, settings in columns.items():
        if name not in config["namms"]:
            settings["budget"] = matched if budget is None else budget
        console.print(f"{task.name}: {name}")
        watched = list(task.watch(units, build_policy(settings)))
        found[name] = {"policy": settings, **summarise(kept_of(watched, task.env_id))}
        if name == REFERENCE:
            matched = matched_budget([_row(one, task, config["seed"]) for one in watched], task.name)
    return found


def _row(watched: WatchedEpisode, task: Episodes, seed: int) -> Row:
    """What a study would have of an episode under the reference."""
    unit, score = str(watched.episode.seed), watched.episode.return_raw
    kept = watched.kept_at_updates
    return Row(task.name, REFERENCE, unit, unit, seed, OK, task.metric, score, kept_at_updates=kept)


def main(
    out: Annotated[Path, typer.Option(help="Folder for kept.json, kept.png and table.md.")],
    budget: Annotated[float | None, typer.Option(help="Fraction of the tokens seen, for every policy.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
) -> None:
    """What memories keep of episodes, and what of the time around near falls."""
    chosen = overrides or []
    if not any(one.startswith("task=") for one in chosen):
        chosen = ["task=offline_rl/hopper", *chosen]
    config, console = composed("study", chosen), Console()
    for key, instead in UNREAD.items():
        if any(re.split("[.=]", one.lstrip("+~"), maxsplit=1)[0] == key for one in chosen):
            raise ConfigError(f"{key} is a setting of a study and is not read here{instead and f': give {instead}'}")
    use_executor(config["executor"])
    out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written is told before hours are spent
    record(out / "provenance.json", build_task(config["task"]).inputs(), config["seed"])
    found = measure_kept(config, console, budget)
    ranked = [] if budget is None else ["--budget", str(budget)]
    command = "python -P -m namm_transfer.eval.offline_rl.kept --out FOLDER " + shlex.join([*ranked, *chosen])
    content = {"command": command, "task": config["task"]["name"], "policies": found}
    write_atomically(out / "kept.json", json.dumps(content, indent=1) + "\n")
    write_atomically(out / "table.md", f"{table(found)}\n![kept](kept.png)\n\nMade by `{command}`.\n")
    draw(found, AROUND, out / "kept.png")
    console.print(table(found), f"written: {out / 'kept.json'}, {out / 'kept.png'}, {out / 'table.md'}", sep="\n")


if __name__ == "__main__":
    with plain_errors():
        typer.run(main)
