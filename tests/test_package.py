"""What is installed: the folders of the repository, under one top-level name."""

from __future__ import annotations

import ast
import importlib.util
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"namm_transfer": "namm_transfer", "adapters": "namm_transfer.adapters", "eval": "namm_transfer.eval"}
ALLOWED = {
    "namm_transfer": {"namm_transfer"},
    "adapters": {"namm_transfer", "namm_transfer.adapters"},
    "eval": {"namm_transfer", "namm_transfer.adapters", "namm_transfer.eval", "namm_transfer.configs"},
}


def room_of(module: str) -> str:
    """The room that a module of the package belongs to, by its dotted name."""
    parts = module.split(".")
    named = ".".join(parts[:2])
    return named if named in {*ROOMS.values(), "namm_transfer.configs"} else parts[0]


def test_every_package_is_listed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {"namm_transfer.configs"}
    for folder, name in ROOMS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inner = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join((name, *inner)))
    assert listed == found


def test_one_top_level_name() -> None:
    top = {Path(str(file)).parts[0] for file in distribution("namm-transfer").files or []}
    assert not {"adapters", "eval", "configs", "tests"} & top
    assert importlib.util.find_spec("namm_transfer.adapters")
    assert importlib.util.find_spec("namm_transfer.eval")


def test_packaged_files_are_there() -> None:
    import namm_transfer
    import namm_transfer.configs
    import namm_transfer.eval

    weights = Path(namm_transfer.__path__[0]) / "weights" / "default"
    assets = Path(namm_transfer.eval.__path__[0]) / "assets"
    configs = Path(namm_transfer.configs.__path__[0])
    assert (weights / "model.safetensors").is_file()
    answering = ("video_llm", "suite_llm", "suite_llm_256", "suite_llm_1024")
    for host in (*answering, "video_encoder", "videomae", "timm_vit", "dt/hopper-v5-noise"):
        assert (assets / "hosts" / host / "model.safetensors").is_file(), host
    assert (assets / "hosts" / "suite_smollm2" / "adapter_model.safetensors").is_file()
    assert len(list((assets / "videos").rglob("*.mp4"))) >= 40
    assert (configs / "transfer.yaml").is_file()
    code = {file.name for file in (ROOT / "namm_transfer" / "kernels").glob("*.[ch]*")}
    assert len(code) > 2
    assert code <= {file.name for file in (Path(namm_transfer.__path__[0]) / "kernels").iterdir()}
    size = sum(f.stat().st_size for f in (assets / "hosts").rglob("*") if f.is_file())
    assert size < 62e6  # four of 5.6e6 and one of 11e6 answer, ten of 1.7e6 play


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room: str) -> None:
    """eval -> adapters -> core. The command line, an entry point, imports eval when a command runs."""
    for file in (ROOT / room).rglob("*.py"):
        if file.is_relative_to(ROOT / "namm_transfer" / "cli") or file.name == "cli.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in names:
                if name.split(".")[0] == "namm_transfer" and file != ROOT / "namm_transfer" / "__init__.py":
                    assert room_of(name) in ALLOWED[room], f"{file.relative_to(ROOT)} imports {name}"
