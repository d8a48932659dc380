"""Frozen dataclass settings (of a training run) from `key=value` overrides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from namm_transfer.configs import nearest, unreadable
from namm_transfer.errors import ConfigError

__all__ = ["check_at_least_one", "from_overrides"]

T = TypeVar("T")


def check_at_least_one(settings: object, *names: str) -> None:
    """Raise ConfigError unless each of the named fields is at least 1; names the dataclass, the field and its value."""
    for name in names:
        if getattr(settings, name) < 1:
            raise ConfigError(f"{type(settings).__name__}.{name} is {getattr(settings, name)}; expected at least 1")


def from_overrides(settings: type[T], overrides: Sequence[str]) -> T:
    """An instance of the dataclass `settings`, its fields set by `overrides`, paths and tuples converted.

    Raises:
        ConfigError: an override cannot be read, names no field, has the wrong type, or a required one is missing.
    """
    values = {}
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise ConfigError(unreadable(text)) from error
        if override.is_sweep_override():
            raise ConfigError(unreadable(text))
        values[override.key_or_group] = override.value()
    return _made(settings, values)


def _made(settings: type[T], values: dict[str, Any], within: str = "") -> T:
    """An instance of the dataclass, its fields of these values; `within` begins their names in messages."""
    hints, converted = get_type_hints(settings), {}
    for key, value in values.items():
        if key not in hints:
            raise ConfigError(f"{within + key!r} is no setting: the nearest is {within + nearest(key, list(hints))!r}")
        converted[key] = _convert(within + key, value, hints[key])
    for field in fields(settings):  # type: ignore[arg-type]
        if field.default is MISSING and field.default_factory is MISSING and field.name not in values:
            raise ConfigError(f"{within}{field.name} has no value: give it one, as in {field.name}=...")
    return settings(**converted)


def _convert(key: str, value: Any, hint: Any) -> Any:
    """`value`, as YAML gives it, in the type `hint`."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and type(None) in inner:
            return None
        return _convert(key, value, next(one for one in inner if one is not type(None)))
    if origin is tuple and isinstance(value, list):
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
        if len(kinds) == len(value):
            pairs = enumerate(zip(value, kinds, strict=True))
            return tuple(_convert(f"{key}[{number}]", item, kind) for number, (item, kind) in pairs)
    if isinstance(hint, type) and is_dataclass(hint) and isinstance(value, dict):
        return _made(hint, value, f"{key}.")
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ConfigError(f"{key} is {value!r}; expected {getattr(hint, '__name__', hint)}")
