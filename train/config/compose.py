"""From `configs/` and the command line to a checked `Config`, and back to text."""

import os
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import hydra
import omegaconf
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from data_prep.errors import InputError
from train.config.explain import check_node, explain, unknown_key
from train.config.keys import CONFIGS, OPEN_GROUPS, WORDS
from train.config.sections import Config

MOVED = {
    "eval.inversion": "eval.qwen.inversion",
    "eval.samplers": "eval.qwen.samplers",
    "eval.validation": "eval.scores.validation",
    "train.loggers": "train.record.loggers",
    "train.wandb_logger": "train.record.wandb_logger",
}
"""Modules that a `_target_` may still name as they were called in older configurations, and where they are now."""


def compose(overrides: list[str]) -> Config:
    """The configuration of `configs/config.yaml` with command-line overrides.

    Raises:
        InputError: an override is malformed, a key or group is unknown, or a value has the wrong type or range.
    """
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        try:
            composed = hydra.compose("config", overrides=[as_given(override) for override in overrides])
        except (HydraException, omegaconf.errors.OmegaConfBaseException, ValueError) as error:
            raise InputError(explain(error)) from error
        return from_hydra(composed)


def as_given(override: str) -> str:
    """An override whose value is quoted where it is meant as it stands: Hydra cannot read it, or would read a path as a list.

    Hydra's own syntax comes first: numbers, lists, sweeps, quotes. A path with a comma or in brackets must exist to be one.
    """
    key, equals, value = override.partition("=")
    if not equals:
        return override
    parser = OverridesParser.create()
    try:
        parsed = parser.parse_override(override)
        if isinstance(parsed.value(), str | int | float | None) or not os.path.exists(value):
            return override
    except HydraException:
        pass
    quoted = f"{key}={QuotedString(value, Quote.single).with_quotes()}"
    try:
        parser.parse_override(quoted)
    except HydraException:  # its key is what is wrong, and Hydra says so
        return override
    return quoted


def from_hydra(composed: DictConfig) -> Config:
    """Checks a composed node and makes it a `Config`.

    Raises:
        InputError: as `compose`.
    """
    try:
        values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=False)
    except omegaconf.errors.OmegaConfBaseException as error:
        raise InputError(explain(error)) from error
    try:
        values = _with_moved(values)
        config = _build(Config, values, "")
        for group in OPEN_GROUPS:
            node = getattr(config, group)
            parts = {group: node} if "_target_" in node else {f"{group}.{name}": part for name, part in node.items()}
            for name, part in parts.items():
                check_node(part, name)
        for name, part in (config.adapter.modules or {}).items():
            check_node(part, f"adapter.modules.{name}")
        return config
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error


def to_yaml(config: Config) -> str:
    """The resolved configuration, as run_dir/config.yaml holds it."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def read_yaml(path: Path) -> dict[str, Any]:
    """What `to_yaml` wrote, with every `_target_` where it is now."""
    return _with_moved(OmegaConf.to_container(OmegaConf.load(path)))


def _with_moved(values: Any) -> Any:
    """The same values, with every `_target_` that names a module of `MOVED` by its place now."""
    if isinstance(values, list):
        return [_with_moved(value) for value in values]
    if not isinstance(values, dict):
        return values
    values = {key: _with_moved(value) for key, value in values.items()}
    module, dot, name = str(values.get("_target_", "")).rpartition(".")
    return values | {"_target_": f"{MOVED[module]}{dot}{name}"} if module in MOVED else values


def _build(kind: Any, values: Mapping[str, Any], prefix: str) -> Any:
    """Fills a dataclass from a mapping, refusing unknown keys and wrong types by their full key."""
    if not isinstance(values, Mapping):
        raise InputError(f"{prefix.rstrip('.')} must be a group of keys, got {values!r}")
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            raise InputError(unknown_key(f"{prefix}{key}"))
    arguments = {}
    for item in fields(kind):
        key, hint = f"{prefix}{item.name}", hints[item.name]
        if item.name not in values:
            continue
        value = values[item.name]
        arguments[item.name] = _build(hint, value, f"{key}.") if is_dataclass(hint) else _checked(value, hint, key)
    return kind(**arguments)


def _checked(value: Any, hint: Any, key: str) -> Any:
    """The value, if it has the hinted type; an int is taken where a float is asked for."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        if type(value) in options:
            return value
        if int in options and (words := [w for option in options for w in typing.get_args(option)]):
            if value not in words:
                raise InputError(f"{key} must be one of {', '.join(words)}, or a whole number, got {value!r}")
            return value
        if len(plain := [_TYPE_NAMES[option] for option in options if option in _TYPE_NAMES]) > 1:
            raise InputError(f"{key} must be {' or '.join(plain)}, got {value!r}")
        return _checked(value, next(option for option in options if option is not type(None)), key)
    if origin is Literal:
        if value not in options:
            raise InputError(f"{key} must be one of {', '.join(map(str, options))}, got {value!r}")
        return value
    if origin is list:
        if not isinstance(value, list):
            raise InputError(f"{key} must be a list such as [a,b], got {value!r}")
        return [_checked(item, options[0], f"{key}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise InputError(f"{key} must be a group of keys, got {value!r}")
        return dict(value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise InputError(f"{key} must be {_TYPE_NAMES[hint]}, got {value!r}")
    return value


_TYPE_NAMES = {int: WORDS["int"], float: WORDS["float"], str: WORDS["str"], bool: WORDS["bool"]}
