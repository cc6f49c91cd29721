"""One sentence for what Hydra says in several lines, and for a key or value that it does not check."""

import difflib
import re
from dataclasses import replace
from typing import Any

from data_prep.errors import InputError
from train.config.keys import CONFIGS, Constructor, Key, all_keys, constructor, nearest_key

RENAMED = {
    "loss/lbm_main": "loss=lbm_main is now called loss=lbm_mostly_source, with the weights 0.95 for the source's stream "
    "and 0.05 for white's instead of 1 and 1",
}
"""Files of `configs/` that had another name, and what to say of them."""


def explain(error: Exception) -> str:
    """One sentence for an error of Hydra or OmegaConf."""
    text = str(error)
    if match := re.search(r"Could not override '([^']+)'", text):
        return unknown_key(match[1])
    if match := re.search(r"Could not (?:find|load) '([^']+)'", text):
        if match[1] in RENAMED:
            return RENAMED[match[1]]
        group, _, name = match[1].rpartition("/")
        valid = _files(group)
        near = difflib.get_close_matches(name, valid, n=1)
        meant = f"did you mean {group}={near[0]}?" if near else f"known here are {', '.join(valid)}"
        return f"there is no configs/{group}/{name}.yaml: {meant}"
    if match := re.search(r"Interpolation key '([^']+)' not found", text):
        return f"the configuration refers to {match[1]}, which does not exist"
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)


def unknown_key(name: str) -> str:
    """What to say of a key that does not exist, or that takes something else."""
    if name == "exp":
        return f"an experiment is added with a plus sign: +exp=NAME, with one of {', '.join(_files('exp'))}"
    if (CONFIGS / name).is_dir():
        return f"{name}= takes a name: {', '.join(_files(name))}"
    keys = {key.name: key for key in all_keys()}
    if name in keys:
        return f"{name} takes its keys one by one: +{name}.NAME=VALUE"
    key = nearest_key(name)
    return f"unknown key {name}: {meant(key)}" if key else f"unknown key {name}: --keys WORD searches all keys"


def meant(key: Key) -> str:
    """The question, with what the key is for."""
    about = f" ({key.meaning.split('. ')[0].rstrip('.')})" if key.meaning else ""
    return f"did you mean {key.name}?{about}"


def check_node(node: dict[str, Any], prefix: str) -> None:
    """Compares the keys of an open group with the arguments of the class that it names.

    Raises:
        InputError: the class has no such argument, or a value is of another type.
    """
    target = constructor(node["_target_"])
    for name, value in node.items():
        if name == "_target_":
            continue
        key = target.arguments.get(name)
        if key is None and not target.is_open:
            raise InputError(f"unknown key {prefix}.{name}: {_instead(prefix, name, target)}")
        if key is not None and not _fits(value, key.annotation):
            raise InputError(f"{prefix}.{name} must be {key.kind}, got {value!r}")


def _instead(prefix: str, name: str, target: Constructor) -> str:
    """The argument that was meant, or those that there are."""
    if near := difflib.get_close_matches(name, target.arguments, n=1):
        return meant(replace(target.arguments[near[0]], name=f"{prefix}.{near[0]}"))
    if (key := nearest_key(f"{prefix}.{name}")) and key.name.startswith(f"{prefix}."):
        return meant(key)
    return f"{prefix} has {', '.join(target.arguments)}"


def _fits(value: Any, annotation: str) -> bool:
    """Whether a plain value may be given for the type. Types that are not plain are left to the class."""
    kinds = {"int": int, "float": (int, float), "str": str, "bool": bool}
    plain = []
    for part in annotation.split(" | "):
        if part == "None":
            plain.append(value is None)
        elif part in kinds:
            plain.append(isinstance(value, kinds[part]) and (part == "bool" or not isinstance(value, bool)))
        else:
            return True
    return any(plain)


def _files(group: str) -> list[str]:
    """The names that a group of `configs/` has."""
    return sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))
