"""Studies side by side: figures, marks where a difference is certain, and links that lead somewhere."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from namm_transfer.errors import ConfigError, DataError
from namm_transfer.eval.overview import markdown, overview, studied
from namm_transfer.eval.results import Row, RunFolder

CLIPS = 8
FULL, HALF, NOTHING = [1.0] * CLIPS, [1.0, 0.0] * (CLIPS // 2), [0.0] * CLIPS


def column(name: str, scores: list[float], budget: float | None) -> list[Row]:
    """Two questions a clip, both with the clip's score."""
    row = Row("video_qa/fake", name, "", "", 0, "ok", "accuracy", score=0, kept_at_updates=budget, budget=budget)
    return [
        replace(row, unit=f"{clip}/{question}", cluster=str(clip), score=score)
        for clip, score in enumerate(scores)
        for question in range(2)
    ]


def write(folder: Path, **parts: list[Row]) -> Path:
    for name, rows in parts.items():
        policies: dict[str, object] = {policy: {} for policy in (*(row.policy for row in rows), "window")}
        run = RunFolder.open(folder / name, {"policies": policies})
        for row in rows:
            run.append(row)
    (folder / "table.md").touch()
    return folder


@pytest.fixture
def studies(tmp_path: Path) -> list[Path]:
    first = write(
        tmp_path / "studies" / "first",
        rules=[
            *column("full", FULL, None),
            *column("h2o-0.5", NOTHING, 0.5),
            *column("random-0.5", FULL, 0.5),
            *column("tova-0.5", [0.0, *HALF[1:]], 0.5),
            *column("h2o-matched", FULL, 0.5),
        ],
        namm=[*column("namm", FULL, None), *column("namm-0.5", HALF, 0.5)],
    )
    second = write(
        tmp_path / "studies" / "second",
        rules=[*column("full", HALF, None), *column("h2o-0.25", HALF, 0.25), *column("h2o-0.5", HALF, 0.5)],
        namm=[*column("namm-0.25", HALF, 0.25), *column("namm-0.5", HALF, 0.5)],
    )
    return [first, second]


def tables(text: str) -> dict[str, dict[str, list[str]]]:
    """budget -> first cell of a line -> its other cells."""
    found = {}
    for part in text.split("## ")[1:]:
        lines = [line for line in part.splitlines() if line.startswith("|")]
        rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
        found[part.split()[0]] = {name: cells for name, *cells in rows}
    return found


def test_every_budget_of_the_reference_has_a_table(studies: list[Path], tmp_path: Path) -> None:
    found = tables(markdown([studied(folder, "namm") for folder in studies], "namm", tmp_path))
    assert list(found) == ["0.25", "0.5"]
    half = found["0.5"]
    reference = half.pop("**namm**")
    assert reference[0].startswith("0.50 [0.")
    assert reference[1] == "1.00 [1.00, 1.00]"
    assert half == {
        "": [f"[{name}](studies/{name}/table.md)" for name in ("first", "second")],
        "---": ["---:", "---:"],
        "units / clusters": ["16 / 8", "16 / 8"],
        "metric": ["accuracy", "accuracy"],
        "score of the full cache": ["1.00", "0.50"],
        # every second clip apart, and in the same direction: certain; one clip of eight: not
        "h2o": ["0.00 −", "1.00"],
        "random": ["1.00 +", ""],
        "tova": ["0.38", ""],
    }
    assert found["0.25"]["score of the full cache"] == ["0.50"]  # the first study has no such budget
    assert found["0.25"]["h2o"] == ["1.00"]


def test_marks_are_of_the_policy_that_is_asked_for(studies: list[Path], tmp_path: Path) -> None:
    found = tables(markdown([studied(studies[0], "h2o")], "h2o", tmp_path))
    assert found["0.5"]["namm"] == ["0.50 +"]


def test_what_has_no_fraction_has_a_dash(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "none",
        rules=[*column("full", NOTHING, None), *column("h2o-0.5", FULL, 0.5)],
        namm=column("namm-0.5", NOTHING, 0.5),
    )
    found = tables(markdown([studied(folder, "namm")], "namm", tmp_path))
    assert (found["0.5"]["**namm**"], found["0.5"]["h2o"]) == (["–"], ["– +"])


def test_the_file_names_its_command_and_links_to_the_tables(studies: list[Path], tmp_path: Path) -> None:
    shown, out = io.StringIO(), tmp_path / "there" / "overview.md"
    overview(studies, "namm", out, Console(file=shown, width=80))
    text = out.read_text()
    links = re.findall(r"\]\((.*?)\)", text)
    assert len(links) == 3
    assert all((out.parent / link).is_file() for link in links)
    assert f"namm-transfer overview {studies[0]} {studies[1]} --ahead namm --out {out}" in text
    assert text in shown.getvalue()


def test_folders_of_the_same_name_are_told_apart(studies: list[Path], tmp_path: Path, monkeypatch) -> None:
    other = write(tmp_path / "others" / "first", rules=column("full", FULL, None), namm=column("namm-0.5", HALF, 0.5))
    found = tables(markdown([studied(folder, "namm") for folder in (studies[0], other)], "namm", tmp_path))
    assert [cell.split("]")[0] for cell in found["0.5"][""]] == ["[studies/first", "[others/first"]
    odd = other.rename(tmp_path / "a | b")
    monkeypatch.chdir(odd)
    found = tables(markdown([studied(Path(), "namm")], "namm", tmp_path))
    assert found["0.5"][""] == [r"[a \| b](a%20%7C%20b/table.md)"]


def test_what_is_no_finished_study_is_told(studies: list[Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere holds no rows of a study"):
        studied(tmp_path / "nowhere", "namm")
    with pytest.raises(DataError, match=r"first has no column 'nam' at any budget; there are h2o, namm, random, tova"):
        studied(studies[0], "nam")
    lacking = write(tmp_path / "lacking", namm=column("namm-0.5", FULL, 0.5))
    with pytest.raises(DataError, match="lacking: no column 'full'"):
        studied(lacking, "namm")
    write(studies[1], other=[replace(row, seed=1) for row in column("other-0.5", HALF, 0.5)])
    with pytest.raises(DataError, match="second: expected the rows of one task and seed"):
        studied(studies[1], "namm")
    config = {"policies": {"other-0.25": {}, "other-0.5": {}}}
    (studies[0] / "other").mkdir()
    OmegaConf.save(OmegaConf.create(config), studies[0] / "other" / "config.yaml")
    with pytest.raises(DataError, match=r"first is not finished: there are no rows of other-0.25, other-0.5"):
        studied(studies[0], "namm")
    with pytest.raises(ConfigError, match="expected every study once; got .*first.*first"):
        overview([*studies, studies[0] / "namm" / ".."], "namm", tmp_path / "out.md", Console())
