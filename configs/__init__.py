"""The packaged configurations, and their composition with `key=value` overrides.

Every command has one YAML file here; the folders are Hydra's config groups. An override that names
an unknown key or option is refused with the nearest valid one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from namm_transfer.errors import ConfigError

__all__ = ["compose", "composed", "flatten", "given", "nearest", "unreadable"]

ROOT = Path(__file__).resolve().parent
_OPEN = ("namms", "policies", "tasks", "variants")
"""Mappings that hold whatever a user names."""


def compose(command: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration of `command` after `overrides`, every value resolved.

    Raises:
        ConfigError: an override cannot be read, names an unknown key or option, or leaves a required
            value unset.
    """
    try:
        config = _compose(command, overrides)
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise ConfigError(f"{missing[0]} has no value: give it one, as in {missing[0]}=...")
        OmegaConf.resolve(config)
        _refuse_holes(command, config)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(command, overrides, error)) from error
    return config


def composed(command: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The configuration that :func:`compose` makes, as plain values."""
    loaded: Any = OmegaConf.to_container(compose(command, overrides), resolve=True)
    return {str(key): value for key, value in loaded.items()}


def given(config: Mapping[str, Any], group: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Those settings of `group` in a composed `config` that `overrides` set, all of them if they choose the group."""
    keys = [override.key_or_group for override in OverridesParser.create().parse_overrides(list(overrides))]
    if group in keys:
        return dict(config[group])
    names = [key.removeprefix(f"{group}.").split(".")[0] for key in keys if key.startswith(f"{group}.")]
    return {name: config[group].get(name) for name in names}


def flatten(config: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every leaf of nested mappings as (dotted key, value); an empty mapping is a leaf."""
    if isinstance(config, dict) and (config or not prefix):
        for key, value in config.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, config


def nearest(given: str, candidates: Sequence[str]) -> str:
    """The candidate most like what was given."""
    return difflib.get_close_matches(given, candidates, n=1, cutoff=0.0)[0]


def unreadable(override: str) -> str:
    """What to say of an override that Hydra cannot read, or takes for several."""
    if "=" not in override:
        return f"cannot read the override {override!r}: expected key=value"
    key, value = override.split("=", 1)
    return (
        f"cannot read the override {override!r}: a value that holds spaces or any of ,:=()[]{{}}~'\" needs quotes that "
        f"the shell leaves, as in \"{key}='{value}'\""
    )


def _compose(command: str, overrides: Sequence[str]) -> DictConfig:
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT)):
        return hydra_compose(command, overrides=[_placed(command, override) for override in overrides])


def _placed(command: str, override: str) -> str:
    """`model=NAME` chooses the host of the one task that a command has: its place is `task.model`."""
    if not override.startswith("model="):
        return override
    written: Any = OmegaConf.load(ROOT / f"{command}.yaml")
    of_task = any(isinstance(entry, DictConfig) and "task" in entry for entry in written.get("defaults", []))
    return f"model@task.{override}" if of_task else override


def _refuse_holes(command: str, config: DictConfig) -> None:
    """Raise if what the command cannot do without was taken away: `~task`, `policies=null`."""
    for name, default in _compose(command, ()).items_ex(resolve=False):
        key = str(name)
        if key not in config:
            raise ConfigError(f"{key} was taken away, and `{command}` needs it")
        if isinstance(default, DictConfig) and not isinstance(config[key], DictConfig):
            raise ConfigError(f"{key} is {config[key]!r}, and `{command}` needs settings there")


def _explain(command: str, overrides: Sequence[str], error: Exception) -> str:
    """Say which override is at fault, and what it may have meant."""
    parser = OverridesParser.create()
    parsed: list[Override] = []
    for text in overrides:
        try:
            one = parser.parse_override(text)
        except HydraException:
            return unreadable(text)
        if one.is_sweep_override():
            return unreadable(text)
        parsed.append(one)
    # Choices of groups first: the keys of a task exist only once the task is chosen.
    parsed.sort(key=lambda one: not _options(one))
    accepted: list[str] = []
    for one in parsed:
        try:
            config = _compose(command, [*accepted, str(one.input_line)])
        except (HydraException, OmegaConfBaseException):
            return _meant(command, accepted, one)
        accepted.append(str(one.input_line))
    del config
    return str(error).splitlines()[0]


def _options(override: Override) -> list[str]:
    """The options of the group that `override` chooses from; none if it sets a key."""
    folder = ROOT / override.key_or_group
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def _meant(command: str, accepted: list[str], override: Override) -> str:
    if options := _options(override):
        given, kind = str(override.value()), f"option of {override.key_or_group}"
        candidates = options
        if given in options:
            return f"`{command}` has no {override.key_or_group} to choose (given: {override.input_line})"
    else:
        given, kind = override.key_or_group, f"key of `{command}`"
        config, value = _compose(command, accepted), override.value()
        held = OmegaConf.select(config, given, default={})
        added = [key for key in value if key not in held] if given in _OPEN and isinstance(value, dict) else []
        if added and not override.is_delete():
            return f"{given} has no {added[0]!r}: add it as in +{given}.{added[0]}=... (given: {override.input_line})"
        candidates = [key for key, _ in flatten(OmegaConf.to_container(config, resolve=False))]
        candidates += [folder.name for folder in ROOT.iterdir() if any(folder.glob("**/*.yaml"))]
    return f"{given!r} is no {kind}: the nearest is {nearest(given, candidates)!r} (given: {override.input_line})"
