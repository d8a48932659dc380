"""The table says what the rows say."""

import io

import pytest
from rich.console import Console

from namm_transfer.errors import DataError
from namm_transfer.eval.report import markdown, report, summarise, table
from namm_transfer.eval.results import Row, RunFolder


def rows():
    scores = {"full": [1, 1, 1, 0], "namm": [1, 0, 1, 0], "window": [1, 1]}
    kept = {"full": 1.0, "namm": 0.25, "window": None}
    at_updates = kept | {"full": None}  # no update; the table shows what it kept all the same
    for policy, values in scores.items():
        for i, score in enumerate(values):
            yield Row(
                task="qa",
                policy=policy,
                unit=str(i),
                cluster=f"clip{i // 2}",
                seed=0,
                status="ok",
                metric="accuracy",
                score=float(score),
                kept_at_updates=at_updates[policy],
                kept_fraction=kept[policy],
                bytes_total=None if policy == "window" else 2**20,
                budget=0.25 if policy == "namm" else None,
                seconds=0.5,
            )
    yield Row(task="qa", policy="namm", unit="4", cluster="clip2", seed=0, status="undecodable", metric="accuracy")


def test_summary_pairs_units_and_counts_what_is_missing():
    cell = summarise(list(rows()), ["full", "namm"])["qa"]
    assert list(cell) == ["full", "namm", "window"]
    assert cell["namm"]["score"]["value"] == 0.5
    assert cell["full"]["score"]["value"] == 0.75
    assert cell["namm"]["difference_to_full"]["value"] == -0.25
    assert cell["namm"]["fraction_of_full"]["value"] == pytest.approx(2 / 3)
    assert cell["window"]["fraction_of_full"]["value"] == 1.0, "against the full cache on the same two units"
    assert (cell["namm"]["units"], cell["namm"]["undecodable"], cell["namm"]["seconds"]) == (4, 1, 2.0)


SNAPSHOT = """\
# Summary

Score ± half of its 95 % interval, clustered by video or episode (±0: all clusters alike; –: undefined),
mean fraction of tokens kept just after the updates, bytes of the memory with the policy's state.

| task | full | namm | window |
|---|---:|---:|---:|
| **qa**, accuracy | 0.750 ±3.177 | 0.500 ±0.000 | 1.000 ±– |
| kept | 100.0% | 25.0% | – |
| bytes | 1.00 MiB | 1.00 MiB | – |

Against the full cache on the same units: paired difference, and fraction of its score.

| task | full | namm | window |
|---|---:|---:|---:|
| qa, difference | 0.000 ±0.000 | -0.250 ±3.177 | 0.000 ±– |
| qa, fraction | 1.000 ±0.000 | 0.667 ±2.824 | 1.000 ±– |

qa: 4 units scored, 1 undecodable.
"""


def test_markdown_is_exactly_this():
    assert markdown(summarise(list(rows()))) == SNAPSHOT


def test_terminal_table_shows_every_column_and_no_value_for_none():
    console = Console(file=io.StringIO(), width=120)
    console.print(table(summarise(list(rows()))))
    shown = console.file.getvalue()
    for text in ("full", "namm", "window", "0.500 ±0.000", "25.0%", "1.00 MiB", "1 undecodable", "1.000 ±–"):
        assert text in shown


def test_report_writes_all_three_files_and_can_be_repeated(tmp_path):
    folder = RunFolder.open(tmp_path / "run", {"policies": {"namm": {}, "full": {}}})
    with pytest.raises(DataError, match="holds no rows"):
        report(folder, Console(file=io.StringIO()))
    for row in rows():
        folder.append(row)
    report(folder, Console(file=io.StringIO()))
    first = {name: (folder.path / name).read_bytes() for name in ("summary.json", "summary.md")}
    assert (folder.path / "summary.png").stat().st_size > 5000
    report(RunFolder(folder.path), Console(file=io.StringIO()))
    assert first == {name: (folder.path / name).read_bytes() for name in first}
    assert b"| task | namm | full | window |" in first["summary.md"]
