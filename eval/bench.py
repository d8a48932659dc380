"""What a policy costs: prefill, decoding and peak memory beside the unmodified model, as ratios inside one run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from namm_transfer.errors import ConfigError
from namm_transfer.eval.bench_host import BenchHost, peak
from namm_transfer.eval.bench_peer import Peer
from namm_transfer.eval.bench_report import write_report
from namm_transfer.eval.executor import use_executor
from namm_transfer.eval.provenance import record
from namm_transfer.eval.results import RunFolder
from namm_transfer.eval.workers import build_policy
from namm_transfer.files import append_json, whole_lines
from namm_transfer.layer import check_interval

__all__ = ["PLAIN", "bench"]

PLAIN = "sdpa"
"""The column of the unmodified model."""
PEER = "kvpress"
"""Columns of that package are called kvpress/...; their reference is the unmodified model in their own process."""


def bench(config: Mapping[str, Any], out: Path, console: Console) -> dict[str, Any]:
    """Measure every column; columns take turns within a repeat, so that a busy moment hits them alike.

    Measurements are on disk as soon as they exist, and a second run of the same configuration goes on after them.

    Returns:
        The summary: for each column and length the median seconds and the ratios to the unmodified model, the
        exponents with which times grow, peak memory, and the cost of a population.

    Raises:
        ConfigError: a length or count out of range, or an unknown type of weights.
    """
    _check(config)
    use_executor(config["executor"])
    kept = {key: value for key, value in config.items() if key != "out"}
    folder = RunFolder.open(out, kept | {"kvpress": bool(config["kvpress"])})  # its path is this machine's affair
    record(out / "provenance.json", {}, config["seed"])
    done = {_key(row): row for row in map(json.loads, whole_lines(folder.lines))}
    with ExitStack() as stack:
        peer = stack.enter_context(Peer(config["kvpress"], config)) if config["kvpress"] else None
        columns = [PLAIN, *config["policies"], *([f"{PEER}/{name}" for name in peer.columns] if peer else [])]
        turns = [
            {"kind": "time", "length": length, "repeat": repeat, "column": column}
            for length in config["lengths"]
            for repeat in range(config["repeats"] + 1)  # the first one only warms up
            for column in columns
        ]
        if config["peak_length"]:
            turns += [{"kind": "peak", "length": config["peak_length"], "repeat": 1, "column": c} for c in columns]
        if config["population"]:
            turns += [
                {"kind": "population", "length": config["population_length"], "repeat": repeat, "column": column}
                for repeat in range(config["repeats"] + 1)
                for column in (PLAIN, "one", "population")
            ]
        todo = [turn for turn in turns if _key(turn) not in done]
        host = BenchHost(config) if todo else None
        for turn in track(todo, "bench", console=console):
            assert host is not None  # there is something to do
            row = turn | _measure(config, host, peer, turn)
            append_json(folder.lines, row)
            done[_key(turn)] = row
    summary = _summarise([row for row in done.values() if row["repeat"]])
    write_report(out, config, summary, console)
    return summary


def _measure(config: Mapping[str, Any], host: BenchHost, peer: Peer | None, turn: Mapping[str, Any]) -> dict[str, Any]:
    column, length = turn["column"], turn["length"]
    if turn["kind"] == "population":
        return host.population(column, length, config["population"])
    if peer is not None and column.startswith(f"{PEER}/"):
        name = column.removeprefix(f"{PEER}/")
        return peer.peak(name, length) if turn["kind"] == "peak" else peer.time(name, length)
    if turn["kind"] == "peak":
        return peak(dict(config), column, length)
    return host.time(column, length)


def _summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over repeats and ratios to the reference of each column."""

    def of(kind: str, column: str, length: int, value: str) -> float:
        return median(r[value] for r in rows if (r["kind"], r["column"], r["length"]) == (kind, column, length))

    timed = [r for r in rows if r["kind"] == "time"]
    lengths = sorted({r["length"] for r in timed})
    columns = list(dict.fromkeys(r["column"] for r in timed))
    summary: dict[str, Any] = {"time": {}, "exponent": {}, "peak": {}, "population": {}}
    for column in columns:
        plain = _reference(column)
        cells = {}
        for length in lengths:
            values = {v: of("time", column, length, v) for v in ("prefill", "decode", "kept", "bytes")}
            ratios = [
                sorted(
                    r[v] / s[v]
                    for r in timed
                    for s in timed
                    if (r["column"], s["column"], r["length"], s["length"]) == (column, plain, length, length)
                    and r["repeat"] == s["repeat"]
                )
                for v in ("prefill", "decode")
            ]
            cells[length] = {
                "prefill_seconds": values["prefill"],
                "prefill_tokens_per_second": length / values["prefill"],
                "prefill_ratio": median(ratios[0]),
                "prefill_ratio_range": [ratios[0][0], ratios[0][-1]],
                "decode_seconds_per_token": values["decode"],
                "decode_ratio": median(ratios[1]),
                "decode_ratio_range": [ratios[1][0], ratios[1][-1]],
                "kept_fraction": values["kept"],
                "bytes": values["bytes"],
            }
        summary["time"][column] = cells
        if len(lengths) > 1:
            seconds = [cells[length]["prefill_seconds"] for length in lengths]
            summary["exponent"][column] = float(np.polyfit(np.log(lengths), np.log(seconds), 1)[0])
    for row in rows:
        if row["kind"] == "peak":
            plain_growth = of("peak", _reference(row["column"]), row["length"], "growth")
            summary["peak"][row["column"]] = {
                "length": row["length"],
                "growth_bytes": row["growth"],
                "ratio": row["growth"] / plain_growth,
                "largest_tensor": row.get("largest"),
                "query_key_matrix_elements": row["length"] ** 2,
            }
    population = [r for r in rows if r["kind"] == "population"]
    if population:
        length = population[0]["length"]
        taken = {c: of("population", c, length, "prefill") for c in (PLAIN, "one", "population")}
        summary["population"] = {
            "length": length,
            "seconds": taken,
            "population_over_one": taken["population"] / taken["one"],
            "one_over_plain": taken["one"] / taken[PLAIN],
        }
    return summary


def _reference(column: str) -> str:
    """The unmodified model's column that a column is compared with."""
    return f"{PEER}/{PLAIN}" if column.startswith(f"{PEER}/") else PLAIN


def _key(row: Mapping[str, Any]) -> tuple[str, int, int, str]:
    return row["kind"], row["length"], row["repeat"], row["column"]


def _check(config: Mapping[str, Any]) -> None:
    least = {
        "layers": 1,
        "decode": 1,
        "repeats": 1,
        "peak_length": 0,
        "population": 0,
        "population_length": 16,
        "seed": 0,
    }
    for key, bound in least.items():
        value = config[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < bound:
            raise ConfigError(f"{key} is {value!r}; expected an integer of at least {bound}")
    check_interval(config["update_interval"])
    lengths = config["lengths"]
    if not lengths or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in lengths):
        raise ConfigError(f"lengths is {lengths!r}; expected a list of integers of at least 1")
    dtype = getattr(torch, str(config["dtype"]), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"dtype is {config['dtype']!r}; expected a type of weights, such as 'bfloat16'")
    if not isinstance(config["policies"], Mapping) or not config["policies"]:
        raise ConfigError("policies holds no column to measure")
    for column, settings in config["policies"].items():
        if not isinstance(settings, Mapping):
            raise ConfigError(
                f"policies.{column} is {settings!r}; expected settings (to leave it out: ~policies.{column})"
            )
        build_policy(settings)
    if config["kvpress"] and not Path(config["kvpress"]).is_file():
        raise ConfigError(f"kvpress is {config['kvpress']!r}; expected the python of an environment that has kvpress")
