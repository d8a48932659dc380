"""A run folder keeps what was finished, drops what was torn, and refuses what does not belong to it."""

import json

import pytest

from namm_transfer.errors import ConfigError, DataError
from namm_transfer.eval.provenance import digest, provenance, record
from namm_transfer.eval.results import Row, RunFolder

CONFIG = {"seed": 0, "tasks": {"a": {"clips": 4}}, "policies": {"full": {"name": "full"}}}


def row(unit, score=1.0, **more):
    return Row(
        task="a", policy="full", unit=unit, cluster="c", seed=0, status="ok", metric="accuracy", score=score, **more
    )


def test_rows_come_back_as_they_were_written(tmp_path):
    folder = RunFolder.open(tmp_path / "run", CONFIG)
    rows = [row("1", 0.1, detail={"reply": "B – ü"}), row("2", budget=0.25, kept_at_updates=None)]
    for one in rows:
        folder.append(one)
    assert RunFolder.open(tmp_path / "run", CONFIG).rows() == rows


def test_a_torn_last_line_is_dropped_and_the_next_row_starts_clean(tmp_path):
    folder = RunFolder.open(tmp_path / "run", CONFIG)
    folder.append(row("1"))
    folder.append(row("2"))
    content = folder.lines.read_bytes()
    folder.lines.write_bytes(content[:-9])
    assert [one.unit for one in folder.rows()] == ["1"]
    folder.append(row("3"))
    assert [one.unit for one in folder.rows()] == ["1", "3"]


def test_a_bad_line_before_the_last_is_an_error_not_a_loss(tmp_path):
    folder = RunFolder.open(tmp_path / "run", CONFIG)
    folder.lines.write_text('{"task": "a"\n' + json.dumps({"task": "a"}) + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl, line 1 is no result row"):
        folder.rows()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 1}, r"seed is 0 there, 1 here"),
        ({"tasks": {"a": {"clips": 5}}}, r"tasks\.a\.clips is 4 there, 5 here"),
        ({"tasks": {"a": {"clips": 4, "questions": 2}}}, r"tasks\.a\.questions is not set there, 2 here"),
        ({"policies": {}}, r"policies\.full\.name is 'full' there, not set here"),
    ],
)
def test_another_configuration_is_refused_by_its_first_difference(tmp_path, changed, named):
    RunFolder.open(tmp_path / "run", CONFIG)
    with pytest.raises(ConfigError, match=named):
        RunFolder.open(tmp_path / "run", CONFIG | changed)


def test_a_run_may_get_more_policies_but_keeps_those_it_has(tmp_path):
    folder = RunFolder.open(tmp_path / "run", CONFIG)
    folder.append(row("1"))
    more = CONFIG | {"policies": {"h2o": {"name": "h2o", "budget": 0.5}, **CONFIG["policies"]}}
    again = RunFolder.open(tmp_path / "run", more)
    assert again.config() == more and list(again.config()["policies"]) == ["h2o", "full"]
    assert [one.unit for one in again.rows()] == ["1"]
    for changed, named in (
        (CONFIG, r"policies\.h2o\.name is 'h2o' there, not set here"),
        (
            more | {"policies": {**more["policies"], "full": {"name": "random"}}},
            r"policies\.full\.name is 'full' there",
        ),
        (more | {"seed": 1}, "seed is 0 there, 1 here"),
    ):
        with pytest.raises(ConfigError, match=named):
            RunFolder.open(tmp_path / "run", changed)


def test_what_came_with_a_later_start_is_kept_to(tmp_path):
    record(tmp_path / "provenance.json", {"a": "1"}, 0)
    record(tmp_path / "provenance.json", {"a": "1", "b": "2"}, 0)
    with pytest.raises(DataError, match=r"begun with another b \(it was 2, now 3\)"):
        record(tmp_path / "provenance.json", {"a": "1", "b": "3"}, 0)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(DataError, match="no folder of a run"):
        RunFolder.open(tmp_path, CONFIG)
    with pytest.raises(DataError, match="no folder of a run"):
        RunFolder.open(tmp_path / "thesis.tex", CONFIG)
    with pytest.raises(DataError, match="holds no run"):
        RunFolder(tmp_path / "nowhere").config()


def test_an_ok_row_has_a_finite_score():
    with pytest.raises(DataError, match="expected a finite score"):
        row("1", float("nan"))


def test_provenance_names_no_path_and_no_host(tmp_path, monkeypatch):
    import socket

    written = json.dumps(provenance({"weights": "abc"}, seed=3))
    assert {"started", "seed", "inputs", "versions", "hardware", "revision"} <= set(json.loads(written))
    assert str(tmp_path.home()) not in written
    assert socket.gethostname() not in written
    assert "/" not in written


def test_other_weights_are_refused_on_a_second_start(tmp_path):
    record(tmp_path / "provenance.json", {"weights": "abc"}, 0)
    record(tmp_path / "provenance.json", {"weights": "abc"}, 0)
    assert len(json.loads((tmp_path / "provenance.json").read_text())["starts"]) == 2
    with pytest.raises(DataError, match="another weights"):
        record(tmp_path / "provenance.json", {"weights": "xyz"}, 0)


def test_digest_tells_contents_and_names_apart(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one").write_text("1")
    first = digest(tmp_path / "a")
    assert first == digest(tmp_path / "a")
    assert len(first) == 16
    (tmp_path / "a" / "one").rename(tmp_path / "a" / "two")
    renamed = digest(tmp_path / "a")
    (tmp_path / "a" / "two").write_text("2")
    assert len({first, renamed, digest(tmp_path / "a")}) == 3
