"""The commands as a user types them: what they print, write, refuse, and exit with."""

import json
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from namm_transfer.cli import TRAINERS, app
from namm_transfer.network import NAMM, NUM_PARAMETERS

FAKE = "task._target_=fake_task.FakeTask"


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(Path(__file__).parent / "eval")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        return CliRunner().invoke(app, list(arguments))

    return call


@pytest.fixture
def namm(tmp_path):
    NAMM.from_vector(torch.zeros(NUM_PARAMETERS)).save_pretrained(tmp_path / "namm")
    return f"policy.namm={tmp_path / 'namm'}"


def test_help_lists_every_command(run):
    shown = run("--help").output
    for command in (
        "transfer",
        "eval",
        "evolve",
        "train",
        "inspect",
        "remember",
        "bench",
        "lm-eval",
        "report",
        "overview",
        "doctor",
    ):
        assert command in shown


def test_lm_eval_says_what_to_install(run, monkeypatch):
    import namm_transfer.eval.language as room

    for name in [name for name in sys.modules if name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not there
    monkeypatch.delitem(sys.modules, "namm_transfer.eval.language.harness", raising=False)
    monkeypatch.delattr(room, "harness", raising=False)
    result = run("lm-eval", "run", "--model", "namm", "--tasks", "choubun")
    assert (result.exit_code, "pip install 'namm-transfer[lm-eval]'" in result.output) == (2, True), result.output


def test_eval_writes_a_folder_and_report_prints_it_again(run, namm, tmp_path):
    first = run("eval", FAKE, "task.clips=2", namm, "out=run")
    assert first.exit_code == 0, first.output
    assert "video_qa/shapes" in first.output
    assert "results: run" in first.output
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        *("config.yaml", "provenance.json", "rows.jsonl", "summary.json", "summary.md", "summary.png")
    }
    again = run("report", "run")
    table = again.output[again.output.index("┏") :]
    assert again.exit_code == 0
    assert table in first.output


def test_no_library_talks_in_front_of_the_table(tmp_path):
    """With a packaged host and the packaged NAMM, in a process of its own: what libraries print goes past a runner."""
    arguments = ["eval", "task=video_classification/motion", "task.clips=1", f"out={tmp_path / 'run'}"]
    call = [sys.executable, "-P", "-c", "from namm_transfer.cli import main; main()", *arguments]
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, check=True)
    before = done.stdout[: done.stdout.index("score ±")].strip().splitlines()
    assert [line.split(" · ")[0] for line in before] == ["video_classification/motion"], "the bar alone"
    said = [line for line in done.stderr.splitlines() if "compiling its CPU kernel" not in line]
    assert said == []


def test_results_go_to_a_folder_named_after_command_and_time(run, tmp_path):
    assert run("eval", FAKE, "task.clips=1", "policy=full").exit_code == 0
    (folder,) = (tmp_path / "results").iterdir()
    assert folder.name.startswith("eval-20")


def test_resume_needs_no_settings_and_refuses_others(run, tmp_path):
    arguments = (FAKE, "task.clips=2", "task.questions=8", "policy=full")
    assert run("eval", *arguments, "out=run").exit_code == 0
    lines = (tmp_path / "run" / "rows.jsonl").read_bytes()
    (tmp_path / "run" / "rows.jsonl").write_bytes(lines[: len(lines) // 2])
    resumed = run("eval", "--resume", "run")
    assert resumed.exit_code == 0
    assert "are in run already" in resumed.output
    rows = [json.loads(line) for line in (tmp_path / "run" / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == len({row["unit"] for row in rows}) == 16
    assert run("eval", *arguments, "--resume", "run").exit_code == 0
    other = run("eval", FAKE, "task.clips=3", "policy=full", "--resume", "run")
    assert other.exit_code == 2
    assert "run holds a run of another configuration: tasks.video_qa/shapes.clips is 2 there, 3 here" in other.output


def test_evolve_resumes_with_its_own_settings_and_those_given_now(run, tmp_path, monkeypatch):
    from namm_transfer.evolution import run as evolution

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("evolution: {population: 8, sigma: 0.1, generations: 3}\n")
    seen = []
    monkeypatch.setattr(evolution, "run_evolution", lambda config, folder, *others: seen.append((config, folder)))
    assert run("evolve", "--resume", "run").exit_code == 0
    assert run("evolve", "evolution.generations=5", "evolution.minutes=null", "--resume", "run").exit_code == 0
    first, second = (config for config, _ in seen)
    assert (first.population, first.sigma, first.generations) == (8, 0.1, 3)
    assert second == replace(first, generations=5)
    assert {str(folder) for _, folder in seen} == {"run"}


def test_a_damaged_configuration_is_named(run, tmp_path):
    for content in ("a: [", "- 3", "evolved: 3"):
        (tmp_path / "config.yaml").write_text(content)
        for command in ("eval", "evolve"):
            result = run(command, "--resume", ".")
            assert result.exit_code == 2, result.output
            assert "config.yaml" in result.output or "it lacks executor, policies, seed, tasks" in result.output


def test_interrupt_exits_130_and_says_how_to_go_on(run):
    stopped = run("eval", FAKE, "task.clips=4", "task.questions=8", "policy=full", "+task.interrupt_after=3", "out=run")
    assert stopped.exit_code == 130
    assert "3 of 32 results are kept; go on with: namm-transfer eval --resume run" in stopped.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["transfer", "tasks.video_qa.clip=3"], "the nearest is 'tasks.video_qa.clips'"),
        (["eval", "policy=h2o", "policy.budget=1.5", FAKE], "a budget as a fraction must lie in (0, 1]; got 1.5"),
        (["eval", "policy=h2o", "policy.budget=0", FAKE], "at least 1; got 0"),
        (["eval", "policy=h2o", "policy.budget=half", FAKE], "'half'"),
        (["eval", "policy=h2o", "policy.budget=matched", FAKE], "needs a column 'namm' to match"),
        (["eval", "policy=h2o", FAKE], "policy.budget has no value"),
        (["eval", "policy.namm=nowhere", FAKE], "no NAMM 'nowhere'"),
        (["eval", "policy=full", "task=offline_rl/hopper", "task.model.path=nowhere"], "no host model in nowhere"),
        (["eval", "policy=full", "task.videos=nowhere"], "no manifest of packaged clips at nowhere/manifest.json"),
        (["eval", "policy=full", FAKE, "+task.colour=3"], "cannot build the task"),
        (["eval", "policy=full", FAKE, "seed=-1"], "seed is -1"),
        (["eval", "executor.device=foo", "policy=full", FAKE], "device is 'foo'"),
        (["eval", "executor.threads=two", "policy=full", FAKE], "threads is 'two'"),
        (["transfer", "+policies.x={budget: 0.5}"], "policies.x has no name"),
        (["transfer", "policies.h2o=null"], "policies.h2o is None"),
        (["transfer", "tasks.video_qa=null"], "tasks.video_qa is None"),
        (["transfer", "policies.namm.budget=matched"], "policies.namm.budget is 'matched'"),
        (["eval", "~task"], "task was taken away, and `eval` needs it"),
        (["eval", "~seed"], "seed was taken away"),
        (["inspect", "clip=null"], "clip is None; expected the number of a packaged clip"),
        (["inspect", "executor.device=foo"], "device is 'foo'"),
        (["bench", "dtype=foo"], "dtype is 'foo'"),
        (["bench", "policies=null"], "policies is None, and `bench` needs settings there"),
        (["bench", "+policies.x={budget: 0.5}"], "a policy needs a name"),
        (["eval", "--resume", "nowhere"], "nowhere holds no run"),
        (["report", "nowhere"], "nowhere holds no run"),
        (["overview", "nowhere", "--out", "x.md"], "nowhere holds no rows of a study"),
        (["inspect", "policy=full", FAKE], "has no clips to inspect"),
        (["train", "video_lm"], "no trainer 'video_lm': the nearest is 'video_llm'"),
        (["train", "behaviour", "outptu=x"], "'outptu' is no setting: the nearest is 'output'"),
        (["train", "video_llm"], "out has no value"),
        (["train", "video_encoder", "out=x", "sed=1"], "'sed' is no setting: the nearest is 'seed'"),
        (["evolve", "evolution.populatoin=8"], "the nearest is 'evolution.population'"),
        (["evolve", "evolution.sigma=abc"], "sigma must be a positive number; got 'abc'"),
        (["evolve", "evolution.minutes=abc"], "minutes must be a positive number, or null; got 'abc'"),
        (["evolve", "evolution.hosts=[/nowhere]"], "host '/nowhere' is none of the packaged hosts"),
        (["evolve", "--resume", "nowhere"], "nowhere holds no run"),
        (["evolve", "evolution.minutes=1", "--resume", "nowhere"], "nowhere holds no run"),
        (["eval", FAKE, "policy=full", "--resume", "nowhere"], "nowhere holds no run"),
        (["transfer", "seed=1", "--resume", "nowhere"], "nowhere holds no run"),
        (["bench", "repeats=0"], "repeats is 0; expected an integer of at least 1"),
    ],
)
def test_errors_are_one_message_and_exit_code_2(run, tmp_path, arguments, message):
    result = run(*arguments)
    assert (result.exit_code, message in result.output) == (2, True), result.output
    assert result.output.startswith("error: ")
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == [], "a refused command leaves nothing behind"


def test_a_corrupt_namm_file_is_refused(run, tmp_path, namm):
    file = tmp_path / "namm" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    result = run("eval", FAKE, namm)
    assert result.exit_code == 2
    assert "cannot load a NAMM" in result.output


def test_every_trainer_exists():
    from dataclasses import is_dataclass
    from importlib import import_module

    for place, settings, function in (entry.split(":") for entry in TRAINERS.values()):
        module = import_module(f"namm_transfer.eval.{place}")
        assert is_dataclass(getattr(module, settings))
        assert callable(getattr(module, function))


def test_doctor_knows_every_extra_and_its_packages():
    from namm_transfer.eval.doctor import EXTRAS

    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    extras = {name: len(wanted) for name, wanted in project["optional-dependencies"].items() if name != "dev"}
    assert {name: len(modules) for name, modules in EXTRAS.items()} == extras


def test_doctor_names_what_is_broken(run, monkeypatch):
    from namm_transfer.eval import doctor

    def broken():
        raise OSError("no decoder [for] mp4")

    monkeypatch.setattr(doctor, "_checks", lambda: [("decoder", broken), ("other", lambda: "fine")])
    result = run("doctor")
    assert result.exit_code == 1
    assert "OSError: no decoder [for] mp4" in result.output
    assert "fine" in result.output
    monkeypatch.setattr(doctor, "_checks", lambda: [("other", lambda: "fine")])
    assert run("doctor").exit_code == 0
