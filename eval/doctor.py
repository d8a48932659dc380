"""Does the installation work: versions, extras, decoders, MuJoCo, packaged weights and videos."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec

from rich.console import Console
from rich.table import Table
from torch import nn

from namm_transfer.eval.provenance import hardware, versions
from namm_transfer.network import NAMM

__all__ = ["doctor"]

EXTRAS = {
    "language": ("gguf", "accelerate", "peft"),
    "ray": ("ray",),
    "lm-eval": ("lm_eval", "fugashi"),
    "lmms-eval": ("lmms_eval",),
    "train": ("stable_baselines3", "sbx"),
    "d4rl": ("h5py",),
    "minari": ("minari",),
    "rliable": ("rliable", "pandas"),
}


def doctor(console: Console) -> bool:
    """Print what was found; True if everything that is needed works (extras are not)."""
    table = Table("check", "state", "detail", title="namm-transfer doctor")
    healthy = True
    for name, version in versions().items():
        table.add_row(name, "", version)
    table.add_row("hardware", "", ", ".join(f"{key} {value}" for key, value in hardware().items() if value))
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if find_spec(module) is None]
        state = "[yellow]not installed[/]" if missing else "[green]ok[/]"
        table.add_row(f"extra: {extra}", state, f"missing: {', '.join(missing)}" if missing else ", ".join(modules))
    for check, run in _checks():
        try:
            table.add_row(check, "[green]ok[/]", run())
        except Exception as error:  # whatever is wrong with the installation is what we are here to say
            healthy = False
            table.add_row(check, "[red]broken[/]", f"{type(error).__name__}: {error}".replace("[", r"\["))
    console.print(table)
    return healthy


def _checks() -> Iterator[tuple[str, Callable[[], str]]]:
    yield "ffmpeg (PyAV)", _ffmpeg
    yield "decord, packaged videos", _videos
    yield "MuJoCo", _mujoco
    yield "packaged NAMM", lambda: f"{len(NAMM.from_pretrained('default').to_vector()):,} parameters"
    yield "packaged video LLM", _video_llm
    yield "packaged video encoders", _video_encoders
    yield "packaged decision transformer", _decision_transformer


def _ffmpeg() -> str:
    import av

    return ", ".join(
        f"{name} {'.'.join(map(str, av.library_versions[name]))}" for name in ("libavcodec", "libavformat")
    )


def _mujoco() -> str:
    import gymnasium

    with gymnasium.make("Hopper-v5") as env:
        env.reset(seed=0)
        env.step(env.action_space.sample())
    return "Hopper-v5 steps"


def _videos() -> str:
    from namm_transfer.eval.video import decode
    from namm_transfer.eval.video_classification.packaged import packaged_clips as motion_clips
    from namm_transfer.eval.video_qa.packaged import packaged_clips as qa_clips

    counts = [sum(len(decode(clip.path).frames) > 0 for clip in clips()) for clips in (qa_clips, motion_clips)]
    return f"{counts[0]} question-answering and {counts[1]} motion clips decode"


def _video_llm() -> str:
    from namm_transfer.eval.video_qa.host import load_host

    return _parameters(load_host()[0])


def _video_encoders() -> str:
    from namm_transfer.eval.video_classification.host import PACKAGED_HOSTS, load_host

    return "; ".join(_parameters(load_host(folder)[0]) for folder in PACKAGED_HOSTS.values())


def _decision_transformer() -> str:
    from namm_transfer.eval.offline_rl.host import load_host

    return _parameters(load_host()[0])


def _parameters(model: nn.Module) -> str:
    return f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters"
