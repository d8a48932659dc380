"""The command line: every command takes Hydra overrides, such as `task=offline_rl/hopper policy.budget=0.5`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from namm_transfer.configs import composed, given, nearest
from namm_transfer.configs.settings import from_overrides
from namm_transfer.errors import ConfigError, NammTransferError

__all__ = ["app", "main", "plain_errors"]

WIDE = 200
"""Columns of a table when there is no terminal to ask."""
TRAINERS = {
    "video_llm": "video_qa.train:TrainConfig:train",
    "video_encoder": "video_classification.train:TrainConfig:train",
    "behaviour": "offline_rl.behaviour:BehaviourConfig:train_behaviour",
    "episodes": "offline_rl.collect:CollectionConfig:collect_episodes",
    "decision_transformer": "offline_rl.train:TrainingConfig:train_decision_transformer",
}
"""What can be trained -> module below `namm_transfer.eval`, its settings, and the function that takes them."""
TAKES_FOLDER = ("video_llm", "video_encoder")
"""Those whose folder is an argument of its own beside the settings."""

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Hydra overrides.", show_default=False)
]
Resume = Annotated[Path | None, typer.Option(metavar="DIR", help="Go on with the run in this folder.")]


@contextmanager
def plain_errors() -> Iterator[None]:
    """Errors that the toolkit raises on purpose, and files that cannot be written, are one message, not a traceback."""
    try:
        yield
    except (NammTransferError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {_plain(error)}", highlight=False)
        raise SystemExit(2) from error
    except KeyboardInterrupt as interrupt:
        Console(stderr=True, soft_wrap=True).print(_plain(interrupt) or "interrupted", highlight=False)
        raise SystemExit(130) from interrupt


class Commands(TyperGroup):
    """Commands with plain errors."""

    def invoke(self, ctx: Any) -> Any:
        with plain_errors():
            return super().invoke(ctx)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Frozen, language-evolved attention memories (NAMMs) over the KV cache of any transformer.",
)


@app.command()
def transfer(overrides: Overrides = None, resume: Resume = None) -> None:
    """The main job: packaged hosts under the packaged NAMM and under the rules at its measured budget."""
    _evaluate("transfer", overrides, resume)


@app.command(name="eval")
def evaluate(overrides: Overrides = None, resume: Resume = None) -> None:
    """One task under one policy: `eval task=offline_rl/hopper policy=h2o policy.budget=0.5`."""
    _evaluate("eval", overrides, resume)


@app.command()
def study(overrides: Overrides = None) -> None:
    """NAMMs and rules over budgets on one task, with curves: `study task=language/essays +namms.mine=DIR out=DIR`."""
    from namm_transfer.eval.study import study as run
    from namm_transfer.eval.transfer import results_folder

    config = composed("study", overrides or [])
    run(config, results_folder(config["out"], "study"), overrides or [], _console())


@app.command()
def evolve(overrides: Overrides = None, resume: Resume = None) -> None:
    """Evolve a NAMM on language."""
    from namm_transfer.eval.provenance import record
    from namm_transfer.evolution.config import EvolutionConfig
    from namm_transfer.evolution.run import evolve as run
    from namm_transfer.evolution.run import stored_settings

    settings = composed("evolve", overrides or [])
    if resume:  # what the folder was begun with, and on top of it what is given now
        for group, stored in stored_settings(resume).items():
            settings[group] = stored | given(settings, group, overrides or [])

    def provenance(folder: Path, config: EvolutionConfig) -> None:
        record(folder / "provenance.json", {"hosts": ", ".join(config.hosts)}, config.seed)

    run(settings, resume=resume, console=_console(), provenance=provenance)


@app.command()
def train(
    host: Annotated[str, typer.Argument(help=f"One of {', '.join(TRAINERS)}.")], overrides: Overrides = None
) -> None:
    """Train a packaged host again, from scratch or from where it was interrupted."""
    if host not in TRAINERS:
        raise ConfigError(f"no trainer {host!r}: the nearest is {nearest(host, list(TRAINERS))!r}")
    place, settings, function = TRAINERS[host].split(":")
    module, given, folder = import_module(f"namm_transfer.eval.{place}"), overrides or [], []
    if host in TAKES_FOLDER:
        folder = [Path(one.removeprefix("out=")) for one in given if one.startswith("out=")]
        given = [one for one in given if not one.startswith("out=")]
        if len(folder) != 1:
            raise ConfigError("out has no value: give the folder of the trained host, as in out=...")
    getattr(module, function)(from_overrides(getattr(module, settings), given), *folder)
    _console().print(f"trained: {host}")


@app.command()
def inspect(overrides: Overrides = None) -> None:
    """Pictures of what each layer retained of a clip or an episode: `inspect clip=3 policy=h2o policy.budget=0.5`."""
    from namm_transfer.eval.inspect import inspect as run
    from namm_transfer.eval.transfer import results_folder

    config = composed("inspect", overrides or [])
    run(config, results_folder(config["out"], "inspect"), _console())


@app.command()
def bench(overrides: Overrides = None, resume: Resume = None) -> None:
    """Time and peak memory of the policies beside the unmodified model."""
    from namm_transfer.eval.bench import bench as run
    from namm_transfer.eval.transfer import results_folder

    config = composed("bench", overrides or [])
    run(config, resume or results_folder(config["out"], "bench"), _console())


@app.command(
    name="lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def lm_eval(context: typer.Context) -> None:
    """Public benchmarks by lm-evaluation-harness: its own command, which knows our model `namm` and our tasks too."""
    from namm_transfer.eval.language.command import lm_eval as run

    run(context.args)


@app.command()
def remember(
    video: Annotated[Path, typer.Argument(help="A video file.", show_default=False)],
    overrides: Overrides = None,
    question: Annotated[
        list[str] | None, typer.Option(help="What to ask once the video was watched; may be repeated.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep the memory here, also if interrupted.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(metavar="FILE", help="Go on with the memory in this file.")] = None,
) -> None:
    """Watch a video of any length in bounded memory, and ask: `remember a.mp4 --question "What came first?"`."""
    from namm_transfer.eval.remember import remember as run

    given = overrides or []
    run(composed("remember", given), video, question or [], _console(), save=save, resume=resume, overrides=given)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Folder of a run.")]) -> None:
    """Print the table of a run again, and write its summary anew."""
    from namm_transfer.eval.report import report as run
    from namm_transfer.eval.results import RunFolder

    run(RunFolder(folder), _console())


@app.command()
def overview(
    studies: Annotated[list[Path], typer.Argument(help="Folders of studies.", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the tables go, as Markdown.")],
    ahead: Annotated[str, typer.Option(help="The column whose lead over the others is marked.")] = "namm",
) -> None:
    """Studies side by side, a table per budget: `overview docs/results/video/suite_* --out overview.md`."""
    from namm_transfer.eval.overview import overview as run

    run(studies, ahead, out, _console())


@app.command()
def doctor() -> None:
    """Check the installation: versions, extras, decoders, MuJoCo, packaged weights and videos."""
    from namm_transfer.eval.doctor import doctor as run

    raise typer.Exit(0 if run(_console()) else 1)


@app.command(
    name="lmms-eval",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def lmms_eval(context: typer.Context) -> None:
    """Public video benchmarks: hands over to lmms-eval's command, with our model `namm` and its NAMM's fingerprint."""
    from namm_transfer.eval.video_qa.lmms_command import run

    run(context.args)


@app.callback()
def _quiet() -> None:
    # Bars and warnings of transformers would break into ours. Imported here: `--help` need not wait for it.
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def main() -> None:
    """Entry point of `namm-transfer`."""
    app()


def _evaluate(command: str, overrides: list[str] | None, resume: Path | None) -> None:
    from namm_transfer.eval.results import RunFolder
    from namm_transfer.eval.transfer import results_folder
    from namm_transfer.eval.transfer import transfer as run

    stored = RunFolder(resume).config() if resume else None
    if stored is not None and not overrides:  # the folder knows its configuration
        config = stored
    else:
        config = composed(command, overrides or [])
    run(config, resume or results_folder(config["out"], command), _console(), command)


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=WIDE)


def _plain(error: BaseException) -> str:
    """The message as it is: brackets in it are no markup."""
    return str(error).replace("[", r"\[")
