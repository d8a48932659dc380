"""A bench as a table, as Markdown and as a picture of ratio against length."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from namm_transfer.files import write_atomically

__all__ = ["write_report"]


def write_report(out: Path, config: Mapping[str, Any], summary: Mapping[str, Any], console: Console) -> None:
    """Print the tables, and write `summary.json`, `summary.md` and `ratios.png` to ``out``."""
    write_atomically(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    tables = [_times(summary, what) for what in ("prefill", "decode")] + [_memory(summary)]
    lines = [f"{config['dtype']}, {config['host'] or 'random weights'}, update interval {config['update_interval']}."]
    for title, heads, rows in tables:
        table = Table(title=escape(title))
        for index, head in enumerate(heads):
            table.add_column(head, justify="right" if index else "left")
        for row in rows:
            table.add_row(*map(escape, row))
        if rows:
            console.print(table)
            lines += ["", f"**{title}**", "", f"| {' | '.join(heads)} |", f"|{'|'.join([' --- '] * len(heads))}|"]
            lines += [f"| {' | '.join(row)} |" for row in rows]
    if population := summary["population"]:
        said = (
            f"A population ({population['length']} tokens a row): {population['population_over_one']:.2f} times one "
            f"NAMM over the same rows, which is {population['one_over_plain']:.2f} times the unmodified model."
        )
        console.print(said)
        lines += ["", said]
    write_atomically(out / "summary.md", "\n".join(lines) + "\n")
    _picture(out / "ratios.png", summary)
    console.print(f"results: {out}")


def _times(summary: Mapping[str, Any], what: str) -> tuple[str, list[str], list[list[str]]]:
    lengths = list(next(iter(summary["time"].values())))
    heads = ["policy", *(f"{length} tokens" for length in lengths)]
    if what == "prefill":
        heads += ["kept", "tokens/s", "grows as"]
    rows = []
    for column, cells in summary["time"].items():
        row = [column]
        for length in lengths:
            low, high = cells[length][f"{what}_ratio_range"]
            row.append(f"{cells[length][f'{what}_ratio']:.2f} [{low:.2f}, {high:.2f}]")
        if what == "prefill":
            last = cells[lengths[-1]]
            row += [f"{last['kept_fraction']:.0%}", f"{last['prefill_tokens_per_second']:.0f}"]
            exponent = summary["exponent"].get(column)
            row.append("–" if exponent is None else f"N^{exponent:.2f}")
        rows.append(row)
    return f"{what}, times the unmodified model: median [least, most] of the repeats", heads, rows


def _memory(summary: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    rows = []
    for column, cell in summary["peak"].items():
        largest = "–" if cell["largest_tensor"] is None else " × ".join(map(str, cell["largest_tensor"]))
        rows.append([column, f"{cell['growth_bytes'] / 2**20:.0f} MiB", f"{cell['ratio']:.2f}", largest])
    length = next((cell["length"] for cell in summary["peak"].values()), 0)
    return (
        f"peak memory of a prefill of {length} tokens, above the model's own",
        ["policy", "peak", "× unmodified", "largest tensor of an operation"],
        rows,
    )


def _picture(path: Path, summary: Mapping[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axis, what in zip(axes, ("prefill", "decode"), strict=True):
        for column, cells in summary["time"].items():
            lengths = list(cells)
            style = "--" if column.startswith("kvpress") else "-"
            axis.plot(lengths, [cells[n][f"{what}_ratio"] for n in lengths], style, marker="o", label=column)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set(xscale="log", ylim=(0, None), xlabel="tokens", ylabel=f"{what}: times the unmodified model")
        axis.minorticks_off()
        axis.set_xticks(lengths, labels=[str(n) for n in lengths])
    axes[1].legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=110)
    plt.close(figure)
