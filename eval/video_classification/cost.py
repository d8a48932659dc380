"""What a memory costs and saves in a video encoder: accuracy, attention work and time against the fraction kept.

    python -P -m namm_transfer.eval.video_classification.cost --out docs/results/video/encoders

Tokens are evicted layer by layer (each begins with all of them), or carried: what all heads of a layer evicted is gone
for the later ones. Every clip is read by all columns in turn, the unmodified model among them; times are ratios to its
own on the same clip. Killed, it goes on with the next clip.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

from namm_transfer import NAMM, adapt, policy
from namm_transfer.cli import plain_errors
from namm_transfer.eval.claim import claim
from namm_transfer.eval.provenance import record
from namm_transfer.eval.statistics import difference, mean
from namm_transfer.eval.task import packaged_host
from namm_transfer.eval.video import through_mp4
from namm_transfer.eval.video_classification.clips import FPS, HELD_OUT_SEEDS, make_clip, render
from namm_transfer.eval.video_classification.host import PACKAGED_HOSTS, load_host
from namm_transfer.files import append_json, replacing, whole_lines, write_atomically
from namm_transfer.policies import Policy

__all__ = ["columns", "measure"]

MODES = {"layer by layer": False, "carried": True}
_PLAIN = "unmodified"


def columns(names: Sequence[str], budgets: Sequence[float], namm: str) -> dict[str, tuple[Policy, str | None]]:
    """Column -> policy and mode; the full cache has no mode."""
    found: dict[str, tuple[Policy, str | None]] = {"full": (policy("full"), None)}
    for name in names:
        options: dict[str, Any] = (
            {"allocation": "per_layer", "namm": NAMM.from_pretrained(namm)} if name == "namm" else {}
        )
        for budget in budgets:
            for mode in MODES:
                found[f"{name}, {mode}, {budget}"] = (policy(name, budget=budget, **options), mode)
    return found


def measure(
    host: str, chosen: Mapping[str, tuple[Policy, str | None]], seeds: Sequence[int], update_interval: int
) -> Iterator[list[dict[str, Any]]]:
    """Rows of one clip after the other: whether it was told right, work and kept fraction, and seconds."""
    plain, processor = load_host(packaged_host("hosts", {"host": host}, PACKAGED_HOSTS))
    with torch.inference_mode(), ExitStack() as stack:
        calls: dict[str, Any] = {_PLAIN: plain}
        for name, (memory, mode) in chosen.items():
            # each column has a model of its own: attaching changes it for as long as the block lasts
            model = load_host(packaged_host("hosts", {"host": host}, PACKAGED_HOSTS))[0]
            adapted = adapt(model, memory, update_interval, carried=MODES.get(mode or "", False))
            calls[name] = stack.enter_context(adapted)
        for call in calls.values():  # kernels and memory are there for all
            call(**processor(_frames(seeds[0])))
        for seed in seeds:
            clip, inputs, rows = make_clip(seed), processor(_frames(seed)), []
            for name, call in calls.items():
                began = time.perf_counter()
                label = int(call(**inputs).logits.argmax(-1))
                row = {"host": host, "seed": seed, "column": name, "right": label == clip.label}
                row["seconds"] = time.perf_counter() - began
                if name != _PLAIN:
                    row |= {"work": call.memory.attention_work(), "kept": call.stats().kept_at_updates or 1.0}
                rows.append(row)
            yield rows


def _frames(seed: int) -> np.ndarray:
    return through_mp4(render(make_clip(seed)), FPS)


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line per host and column: means over clips, differences to the full cache paired by clip."""
    by_column: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        by_column.setdefault((row["host"], row["column"]), {})[row["seed"]] = row
    lines = []
    for (host, column), of_clips in by_column.items():
        if column == _PLAIN:
            continue
        seeds = sorted(of_clips)
        full, plain = by_column[host, "full"], by_column[host, _PLAIN]
        right = [float(of_clips[seed]["right"]) for seed in seeds]
        lost = difference(right, [float(full[seed]["right"]) for seed in seeds], seeds)
        ratios = [of_clips[seed]["seconds"] / plain[seed]["seconds"] for seed in seeds]
        lines.append(
            {
                "host": host,
                "column": column,
                "clips": len(seeds),
                "kept": float(np.mean([of_clips[seed]["kept"] for seed in seeds])),
                "accuracy": mean(right, seeds).value,
                "against_full": [lost.value, lost.low, lost.high],
                "work": float(np.mean([of_clips[seed]["work"] for seed in seeds])),
                "time": [float(q) for q in np.quantile(ratios, (0.5, 0.25, 0.75))],
            }
        )
    return lines


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """As Markdown."""
    heads = ("host", "column", "clips", "kept", "accuracy", "against full", "attention work", "time / unmodified")
    out = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for line in lines:
        lost, took = line["against_full"], line["time"]
        out.append(
            f"| {line['host']} | {line['column']} | {line['clips']} | {line['kept']:.3f} | {line['accuracy']:.3f} "
            f"| {lost[0]:+.3f} [{lost[1]:+.3f}, {lost[2]:+.3f}] | {line['work']:.3f} "
            f"| {took[0]:.2f} [{took[1]:.2f}, {took[2]:.2f}] |"
        )
    return "\n".join(out) + "\n"


def draw(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Curves over the fraction kept: accuracy, work and time, a row of axes per host."""
    hosts = list(dict.fromkeys(line["host"] for line in lines))
    figure = Figure(figsize=(13, 3.6 * len(hosts)), layout="constrained")
    grid = figure.subplots(len(hosts), 3, squeeze=False)
    for host, row in zip(hosts, grid, strict=True):
        curves: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        for line in lines:
            if line["host"] == host and line["column"] != "full":
                name, mode, _ = line["column"].split(", ")
                curves.setdefault((name, mode), []).append(line)
        names = sorted({name for name, _ in curves})
        for (name, mode), found in curves.items():
            style = {"color": f"C{names.index(name)}", "ls": "--" if MODES[mode] else "-", "marker": "o", "ms": 3}
            kept = [line["kept"] for line in found]
            for axes, of in zip(row, ("accuracy", "work", "time"), strict=True):
                values = [line[of][0] if of == "time" else line[of] for line in found]
                axes.plot(kept, values, label=f"{name}, {mode}", **style)
        (full,) = [line for line in lines if line["host"] == host and line["column"] == "full"]
        for axes, label, level in zip(
            row,
            (f"{host}: accuracy", "query-key products / unmodified", "seconds / unmodified"),
            (full["accuracy"], 1.0, 1.0),
            strict=True,
        ):
            axes.axhline(level, color="black", lw=1)
            axes.set(xlabel="fraction kept just after decisions", ylabel=label)
            axes.grid(alpha=0.3)
        row[0].legend(fontsize="x-small")
    with replacing(path) as partial:
        figure.savefig(partial, dpi=100, format="png")


def main(
    out: Annotated[Path, typer.Option(help="Folder of rows, table and curves.")],
    hosts: Annotated[str, typer.Option(help="Packaged encoders, with commas.")] = ",".join(PACKAGED_HOSTS),
    policies: Annotated[str, typer.Option(help="With commas.")] = "namm,h2o,streaming,random",
    budgets: Annotated[str, typer.Option(help="With commas.")] = "0.15,0.25,0.35,0.5,0.7",
    clips: Annotated[int, typer.Option(help="How many held-out ones.", min=2)] = 64,
    update_interval: Annotated[int, typer.Option(help="Queries between two decisions.")] = 64,
    namm: Annotated[str, typer.Option(help="Packaged name or folder.")] = "default",
    threads: Annotated[int, typer.Option(help="Of the host.", min=1)] = 1,
) -> None:
    """Accuracy, attention work and time of the packaged video encoders under memories."""
    torch.set_num_threads(threads)
    given = {"policies": policies, "budgets": budgets, "interval": update_interval, "namm": namm, "threads": threads}
    claim(out / "config.json", given)
    record(out / "provenance.json", {"namm": NAMM.from_pretrained(namm).fingerprint()}, HELD_OUT_SEEDS)
    chosen = columns(policies.split(","), [float(budget) for budget in budgets.split(",")], namm)
    file = out / "rows.jsonl"
    done = {(row["host"], row["seed"]) for row in map(json.loads, whole_lines(file)) if row["column"] == "full"}
    for host in hosts.split(","):
        seeds = [seed for seed in range(HELD_OUT_SEEDS, HELD_OUT_SEEDS + clips) if (host, seed) not in done]
        if seeds:
            for rows in track(measure(host, chosen, seeds, update_interval), host, total=len(seeds)):
                for row in sorted(rows, key=lambda row: row["column"] == "full"):  # whose row says that all are there
                    append_json(file, row)
    lines = summary([json.loads(line) for line in whole_lines(file)])
    write_atomically(out / "table.md", table(lines))
    write_atomically(out / "table.json", json.dumps(lines, indent=1) + "\n")
    draw(lines, out / "curves.png")
    Console().print(f"written: {out / 'table.md'}, {out / 'curves.png'}")


if __name__ == "__main__":
    with plain_errors():
        typer.run(main)
