"""Studies side by side: figures, marks beyond doubt only, and links that lead somewhere."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from namm_transfer.errors import ConfigError, DataError
from namm_transfer.eval.overview import markdown, overview, studied
from namm_transfer.eval.results import Row, RunFolder

CLIPS = 8


def column(name: str, scores: list[float], budget: float | None, task: str = "video_qa/fake") -> list[Row]:
    """Two questions a clip, both with the clip's score."""
    return [
        Row(
            task=task,
            policy=name,
            unit=f"{clip}/{question}",
            cluster=str(clip),
            seed=0,
            status="ok",
            metric="accuracy",
            score=score,
            kept_at_updates=budget,
            budget=budget,
        )
        for clip, score in enumerate(scores)
        for question in range(2)
    ]


def write(folder: Path, **parts: list[Row]) -> Path:
    for name, rows in parts.items():
        (folder / name).mkdir(parents=True)
        for row in rows:
            RunFolder(folder / name).append(row)
    return folder


@pytest.fixture
def studies(tmp_path: Path) -> list[Path]:
    full, half = [1.0] * CLIPS, [1.0, 0.0] * (CLIPS // 2)
    first = write(
        tmp_path / "studies" / "first",
        rules=[
            *column("full", full, None),
            *column("h2o-0.5", [0.0] * CLIPS, 0.5),
            *column("random-0.5", full, 0.5),
            *column("tova-0.5", [0.0, *half[1:]], 0.5),
            *column("h2o-matched", full, 0.8),  # at a budget that the reference was not given
        ],
        namm=[*column("namm", full, None), *column("namm-0.5", half, 0.5)],
    )
    second = write(
        tmp_path / "studies" / "second",
        rules=[*column("full", half, None), *column("h2o-0.25", half, 0.25), *column("h2o-0.5", half, 0.5)],
        namm=[*column("namm-0.25", half, 0.25), *column("namm-0.5", half, 0.5)],
    )
    return [first, second]


def test_every_budget_of_the_reference_has_a_table(studies: list[Path], tmp_path: Path) -> None:
    parts = markdown([studied(folder, "namm") for folder in studies], "namm", tmp_path).split("## ")
    assert [part.splitlines()[0] for part in parts[1:]] == ["0.25 of the tokens", "0.5 of the tokens"]
    quarter, half = (
        dict(line.strip("| ").split(" | ", 1) for line in part.strip().splitlines()[3:]) for part in parts[1:]
    )
    assert half["units / clusters"] == "16 / 8 | 16 / 8"
    assert half["score of the full cache"] == "1.00 | 0.50"
    assert half["**namm**"].startswith("0.50 [0.")
    assert half["**namm**"].endswith("| 1.00 [1.00, 1.00]")
    assert half["h2o"] == "0.00− | 1.00"
    # 0.5 behind in half of the clips: beyond doubt; 0.125 ahead in one of them: not
    assert half["random"].split(" | ")[0] == "1.00+"
    assert half["tova"].split(" | ")[0] == "0.38"
    assert quarter["score of the full cache"] == "0.50"  # the first study has no such budget


def test_the_file_names_its_command_and_links_to_the_tables(studies: list[Path], tmp_path: Path) -> None:
    shown, out = io.StringIO(), tmp_path / "there" / "overview.md"
    out.parent.mkdir()
    overview(studies, "namm", out, Console(file=shown, width=80))
    text = out.read_text()
    assert "[first](../studies/first/table.md)" in text
    assert f"namm-transfer overview {studies[0]} {studies[1]} --ahead namm --out {out}" in text
    assert text in shown.getvalue()


def test_what_is_no_study_is_told(studies: list[Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere holds no rows of a study"):
        studied(tmp_path / "nowhere", "namm")
    with pytest.raises(DataError, match=r"first has no column 'nam' at any budget; there are h2o, .*namm"):
        studied(studies[0], "nam")
    lacking = write(tmp_path / "lacking", namm=column("namm-0.5", [1.0], 0.5))
    with pytest.raises(DataError, match="lacking: no column 'full'"):
        studied(lacking, "namm")
    with pytest.raises(ConfigError, match="expected every study once; got .*first.*first"):
        overview([*studies, studies[0] / "namm" / ".."], "namm", tmp_path / "out.md", Console())
