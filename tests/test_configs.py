"""Every packaged configuration composes and builds; what is misspelt is refused with what was meant."""

from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf

from namm_transfer import configs
from namm_transfer.configs import compose, flatten, nearest
from namm_transfer.configs.settings import from_overrides
from namm_transfer.errors import ConfigError
from namm_transfer.eval.offline_rl.host import packaged_hosts
from namm_transfer.eval.offline_rl.hub import hub_hosts
from namm_transfer.policies import names, policy

ROOT = Path(configs.__file__).parent
D4RL = [f"offline_rl/{name}" for name in hub_hosts()]
TASKS = sorted(str(path.relative_to(ROOT / "task").with_suffix("")) for path in (ROOT / "task").rglob("*.yaml"))


@pytest.mark.parametrize("command", sorted(path.stem for path in ROOT.glob("*.yaml")))
def test_every_command_composes_and_saves_as_yaml(command):
    config = compose(command)
    assert OmegaConf.create(OmegaConf.to_yaml(config)) == config
    assert "${" not in OmegaConf.to_yaml(config)


def test_the_main_job_compares_every_policy_at_the_matched_budget():
    config = compose("transfer")
    assert set(config.policies) == {*names(), "namm_threshold", "window"}
    rules = set(names()) - {"full", "namm"}
    assert {name for name, settings in config.policies.items() if settings.get("budget") == "matched"} == rules
    # The hosts of language and of D4RL are no packaged ones: they have to be fetched. Those of v5 are a study's, and
    # none was trained on the suite.
    studied = ("language/", "offline_rl/v5/", "video_qa/suite")
    others = {task for task in TASKS if task.startswith(studied) or task in D4RL}
    assert {task.name for task in config.tasks.values()} == {*TASKS} - others
    for column, settings in config.policies.items():
        assert settings.name == ("namm" if column == "namm_threshold" else column)


def test_every_task_of_v5_has_its_host():
    named = {task.removeprefix("offline_rl/v5/") for task in TASKS if task.startswith("offline_rl/v5/")}
    assert len(named) == 9
    for name in named:
        environment, data = name.split("-", 1)
        path = compose("eval", [f"task=offline_rl/v5/{name}", "policy=full"]).task.model.path
        assert path == f"{environment}-v5-{data}" and path in packaged_hosts()


def test_the_main_job_reads_one_namm_by_rank_and_by_threshold():
    policies = compose("transfer", ["policies.namm.namm=mine"]).policies
    assert policies.namm_threshold.namm == policies.namm.namm == "mine"
    assert (policies.namm.budget, policies.namm_threshold.budget) == (0.5, None)


@pytest.mark.parametrize("name", sorted(set(names()) - {"namm"}))
def test_every_rule_builds_from_its_file(name):
    overrides = [] if name == "full" else ["policy.budget=0.5"]
    settings = OmegaConf.to_container(compose("eval", [f"policy={name}", *overrides]).policy)
    assert policy(**settings).name == name


@pytest.mark.parametrize("task", TASKS)
def test_every_task_file_has_exactly_the_settings_of_its_class(task):
    settings = compose("eval", [f"task={task}"]).task
    own = {f.name for f in fields(get_class(settings["_target_"]))} - {"metric", "baselines"}
    assert set(settings) - {"_target_"} == own
    assert settings.name == task
    assert settings.model.update_interval % 16 == 0


@pytest.mark.parametrize(
    ("command", "overrides", "message"),
    [
        ("eval", ["task.clps=3"], "'task.clps' is no key of `eval`: the nearest is 'task.clips'"),
        ("eval", ["polcy=h2o"], "'polcy' is no key of `eval`: the nearest is 'policy'"),
        ("eval", ["policy=h3o"], "'h3o' is no option of policy: the nearest is 'h2o'"),
        (
            "eval",
            ["task=offline_rl/hoper"],
            "'offline_rl/hoper' is no option of task: the nearest is 'offline_rl/hopper'",
        ),
        # A key that exists only under the chosen task, and one that no longer does.
        ("eval", ["task.episods=3", "task=offline_rl/hopper"], "nearest is 'task.episodes'"),
        ("eval", ["task=offline_rl/hopper", "task.clips=3"], "'task.clips' is no key"),
        (
            "transfer",
            ["tasks.offline_rl.model.update_intervall=64"],
            "nearest is 'tasks.offline_rl.model.update_interval'",
        ),
        ("transfer", ["task@tasks.video_qa=video_qa/shape"], "the nearest is 'video_qa/shapes'"),
        ("study", ["variants={x: {kinds: 3}}"], "variants has no 'x': add it as in +variants.x=..."),
        ("study", ["namms={namm: quarter, other: default}"], "namms has no 'other': add it as in"),
        ("eval", ["policy=h2o"], "policy.budget has no value"),
        ("eval", ["policy.budget"], "cannot read the override 'policy.budget': expected key=value"),
        ("eval", ["policy.budget=[0.5"], "cannot read the override"),
        (
            "inspect",
            ["clip=/tmp/a,b.mp4"],
            "needs quotes that the shell leaves, as in \"clip='/tmp/a,b.mp4'\"",
        ),
        (
            "inspect",
            ["clip=~/my clip (1).mp4"],
            "cannot read the override 'clip=~/my clip (1).mp4': a value that holds",
        ),
        ("remember", ["task=video_qa/suite"], "`remember` has no task to choose (given: task=video_qa/suite)"),
    ],
)
def test_what_is_wrong_is_named_with_the_nearest_valid(command, overrides, message):
    with pytest.raises(ConfigError) as error:
        compose(command, overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_overrides_of_nested_groups_and_values_arrive():
    config = compose(
        "transfer", ["tasks.video_qa.model.path=/x", "executor.device=cuda:0", "~tasks.offline_rl", "seed=7"]
    )
    assert config.tasks.video_qa.model.path == "/x"
    assert config.tasks.video_qa.model.device == "cuda:0"
    assert "offline_rl" not in config.tasks
    assert config.policies.random.seed == 7
    assert compose("transfer", ["experiment=quick"]).tasks.offline_rl.episodes == 1


@pytest.mark.parametrize("command", ["eval", "inspect", "study"])
def test_model_is_short_for_the_model_of_the_task(command):
    task = ["task=video_classification/motion"]
    short = compose(command, [*task, "model=videomae"])
    assert short == compose(command, [*task, "model@task.model=videomae"])
    assert short.task.model.host == "videomae"
    assert compose(command, [*task, "model=timm_vit", "task.model.path=DIR"]).task.model.path == "DIR"
    with pytest.raises(ConfigError, match=r"task.model.host has no value"):
        compose(command, ["task=offline_rl/hopper", "model=decision_transformer_d4rl"])
    with pytest.raises(ConfigError, match="'videomea' is no option of model: the nearest is 'videomae'"):
        compose(command, [*task, "model=videomea"])
    assert compose("remember", ["model=llava_next_video"]).model.path == "packaged"


def test_flatten_names_leaves():
    assert dict(flatten({"a": {"b": 1, "c": {}}, "d": [2]})) == {"a.b": 1, "a.c": {}, "d": [2]}
    assert nearest("budgt", ["seed", "budget"]) == "budget"


@dataclass(frozen=True)
class Part:
    name: str
    rate: float = 1.0


@dataclass(frozen=True)
class Settings:
    output: Path
    files: tuple[Path, ...] = ()
    pairs: tuple[tuple[int, float], ...] = ((1, 0.5),)
    steps: int = 3
    rate: float = 0.1
    limit: float | None = 2.0
    flag: bool = True
    parts: tuple[Part, ...] = ()

    def __post_init__(self):
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}; expected at least 1")


def test_settings_take_the_types_of_their_fields():
    made = from_overrides(Settings, ["output=a/b", "files=[x,y]", "pairs=[[20,1],[64,0.25]]", "rate=1", "limit=null"])
    assert made == Settings(Path("a/b"), (Path("x"), Path("y")), ((20, 1.0), (64, 0.25)), rate=1.0, limit=None)
    made = from_overrides(Settings, ["output=a", "parts=[{name: x}, {name: y, rate: 2}]"])
    assert made.parts == (Part("x"), Part("y", 2.0))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "output has no value"),
        (["output=a", "stps=3"], "'stps' is no setting: the nearest is 'steps'"),
        (["output=a", "steps=many"], "steps is 'many'; expected int"),
        (["output=a", "steps=true"], "steps is True; expected int"),
        (["output=a", "pairs=[[1,2,3]]"], "expected"),
        (["output=a", "steps=0"], "steps is 0; expected at least 1"),
        (["output=a", "parts=[3]"], "parts[0] is 3; expected Part"),
        (["output=a", "parts=[{name: x, rat: 3}]"], "'parts[0].rat' is no setting: the nearest is 'parts[0].rate'"),
        (["output=a", "parts=[{name: x}, {rate: 3}]"], "parts[1].name has no value"),
        (["output=[a"], "cannot read the override"),
        (["output=a,b"], "needs quotes"),
    ],
)
def test_bad_settings_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        from_overrides(Settings, overrides)
