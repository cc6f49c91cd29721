"""All keys of a configuration: type, default and meaning, read from the sources that define them, without importing these.

Sections (`train`, `data`, …) are dataclasses, documented field by field. Open groups (`loss`, `optim`, …) name a class with
`_target_`, whose constructor's arguments are the keys.
"""

import ast
import difflib
import functools
import importlib.util
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from train.config import sections

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
OPEN_GROUPS = ("loss", "optim", "logger", "validate")
MODULES = "adapter.modules"
"""A key of a section under which there are such nodes, by name."""
GIVEN = (
    *("params", "num_steps", "max_grad_norm", "decode", "reader", "folder", "processes"),
    *("run_dir", "name", "config", "record", "resumed_step", "state", "token_width"),
)
"""Arguments that a run gives to the objects of open groups."""
CALLED_ELSEWHERE = {
    **dict.fromkeys(("learning_rate", "peak_lr"), "optim.lr"),
    **dict.fromkeys(("max_steps", "max_train_steps", "steps", "epochs", "num_epochs"), "train.num_steps"),
    **dict.fromkeys(("batch_size", "train_batch_size"), "train.global_batch_size"),
    **dict.fromkeys(("gradient_accumulation_steps", "gradient_accumulation"), "train.grad_accum_steps"),
    **dict.fromkeys(("lora_rank", "network_dim"), "adapter.rank"),
    **dict.fromkeys(("lora_alpha", "network_alpha"), "adapter.alpha"),
    **dict.fromkeys(("resolution", "width", "height"), "data.max_pixels"),
    **dict.fromkeys(("output_dir", "output_path"), "run_dir"),
    **dict.fromkeys(("dataset_path", "train_data_dir"), "data.dataset"),
    **dict.fromkeys(("pretrained_model_name_or_path", "model_path"), "model.path"),
    **dict.fromkeys(("resume_from_checkpoint",), "resume"),
    **dict.fromkeys(("mixed_precision", "precision"), "model.dtype"),
}
"""What other trainers call a key."""
WORDS = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false"}


@dataclass(frozen=True)
class Key:
    """A key that can be set."""

    name: str
    """As on the command line: `train.num_steps`."""
    annotation: str
    """The type as it stands in the source."""
    default: str
    """Empty where it must be set."""
    meaning: str
    files: tuple[str, ...] = ()
    """For an open group: the choices, such as `optim=adamw`, that have the key."""

    @property
    def kind(self) -> str:
        """The type in words."""
        return " or ".join(map(_in_words, _alternatives(self.annotation)))


@dataclass(frozen=True)
class Constructor:
    """The arguments of a class, as its source has them."""

    arguments: dict[str, Key]
    """By name, without those that a run gives."""
    is_open: bool
    """Whether it takes others too (`**options`)."""


def all_keys() -> list[Key]:
    """The keys of sections, then those of open groups."""
    return [*section_keys(), *group_keys()]


@functools.cache
def section_keys() -> tuple[Key, ...]:
    """The fields of `Config` and its sections."""
    classes = {node.name: node for node in _tree(Path(sections.__file__)).body if isinstance(node, ast.ClassDef)}

    def keys(kind: ast.ClassDef, prefix: str) -> Iterator[Key]:
        for statement, after in zip(kind.body, [*kind.body[1:], ast.Pass()], strict=True):
            if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
                continue
            name, annotation = f"{prefix}{statement.target.id}", ast.unparse(statement.annotation)
            if annotation in classes:
                yield from keys(classes[annotation], f"{name}.")
            elif name not in OPEN_GROUPS:
                yield Key(name, annotation, _default(statement.value), _text(after))
                for entry in re.findall(r"list\[.*?(\w+Config)\]", annotation):
                    yield from keys(classes[entry], f"{name}[].")

    return tuple(keys(classes["Config"], ""))


@functools.cache
def group_keys() -> tuple[Key, ...]:
    """The arguments of all classes that the files of the open groups name."""
    found: dict[tuple[str, str], Key] = {}
    for node_key in (*OPEN_GROUPS, MODULES):
        group, _, part = node_key.partition(".")
        for file in sorted((CONFIGS / group).glob("*.yaml")):
            node = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
            for prefix, target in _targets((node.get(part) or {}) if part else node, node_key):
                for name, key in constructor(target).arguments.items():
                    full, known = f"{prefix}.{name}", found.get((f"{prefix}.{name}", key.meaning))
                    files = (*known.files, f"{group}={file.stem}") if known else (f"{group}={file.stem}",)
                    found[full, key.meaning] = replace(key, name=full, files=files)
    return tuple(found.values())


def _targets(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    """The prefix and `_target_` of a group's file: its own, or those of its parts (loggers have names)."""
    if "_target_" in node:
        yield prefix, node["_target_"]
        return
    for name, part in node.items():
        if isinstance(part, dict) and "_target_" in part:
            yield f"{prefix}.{name}", part["_target_"]


@functools.cache
def constructor(target: str) -> Constructor:
    """The arguments of the class that `_target_` names. Where its source is not found, anything goes."""
    module, _, name = target.rpartition(".")
    kind = _find_class(module, name)
    init = next((each for each in kind.body if getattr(each, "name", "") == "__init__"), None) if kind else None
    if not isinstance(init, ast.FunctionDef):
        return Constructor({}, is_open=True)
    assert kind
    meanings = _arguments_section(ast.get_docstring(kind) or "") | _arguments_section(ast.get_docstring(init) or "")
    plain, own = init.args.args[1:], [*init.args.args[1:], *init.args.kwonlyargs]
    defaults = [None] * (len(plain) - len(init.args.defaults)) + init.args.defaults + init.args.kw_defaults
    arguments = {
        each.arg: Key(
            each.arg,
            ast.unparse(each.annotation) if each.annotation else "Any",
            _default(default),
            meanings.get(each.arg, ""),
        )
        for each, default in zip(own, defaults, strict=True)
        if each.arg not in GIVEN
    }
    return Constructor(arguments, is_open=init.args.kwarg is not None)


def _find_class(module: str, name: str) -> ast.ClassDef | None:
    """The definition, through the imports of packages that pass it on."""
    try:
        found = importlib.util.find_spec(module.partition(".")[0])
    except (ImportError, ValueError):
        found = None
    if found is None or not found.origin:
        return None
    path = Path(found.origin).parent.joinpath(*module.split(".")[1:])
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not file.is_file():
        return None
    for node in _tree(file).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and node.module and any(each.name == name for each in node.names):
            return _find_class(f"{module}.{node.module}" if node.level else node.module, name)
    return None


def nearest_key(name: str) -> Key | None:
    """The key that was meant: another trainer's word for it, a similar one of its group, or one that ends alike elsewhere."""
    name = re.sub(r"\[\d+\]", "[]", name)
    start, _, last = name.rpartition(".")
    keys: dict[str, Key] = {}
    for key in all_keys():
        keys.setdefault(key.name, key)
    if last in CALLED_ELSEWHERE:
        return keys[CALLED_ELSEWHERE[last]]
    group = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == start}
    if near := difflib.get_close_matches(last, group, n=1):
        return keys[group[near[0]]]
    ends = {key.rpartition(".")[2]: key for key in reversed(keys)}
    near = [last] if last in ends else difflib.get_close_matches(last, ends, n=1, cutoff=0.75)
    return keys[ends[near[0]]] if near else None


def search(word: str) -> list[Key]:
    """Keys that have the word in their name or meaning; all of them for an empty one."""
    return [key for key in all_keys() if word.lower() in f"{key.name} {key.meaning}".lower()]


def as_text(keys: list[Key]) -> str:
    """A few lines for each, for a terminal."""
    lines = []
    for key in keys:
        default = f", default {key.default}" if key.default else ""
        lines += [f"{key.name}  ({key.kind}{default})", *textwrap.wrap(key.meaning, 100)]
    return "\n".join(line if line.startswith(tuple(key.name for key in keys)) else f"    {line}" for line in lines)


def as_markdown() -> str:
    """The manual."""
    parts = [
        "# Configuration\n\nEvery key that can follow `train/run.py`, with its type, its default and what it does.\n"
        "`python train/run.py --keys WORD` prints those whose name or meaning contains WORD.\n"
    ]
    groups: dict[str, list[Key]] = {}
    for key in all_keys():
        groups.setdefault(key.name.partition(".")[0] if "." in key.name else "run", []).append(key)
    for group, keys in groups.items():
        rows = []
        for key in keys:
            default, where = f"`{key.default}`" if key.default else "", ", ".join(f"`{file}`" for file in key.files)
            cells = [f"`{key.name}`", key.kind, default, f"{key.meaning} ({where})" if where else key.meaning]
            rows.append(f"| {' | '.join(cells)} |")
        title = "The run" if group == "run" else f"`{group}`"
        parts.append(f"## {title}\n\n| key | type | default | |\n|---|---|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _text(node: ast.AST) -> str:
    """Of a string that stands by itself, in one line."""
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return " ".join(str(node.value.value).split()) if is_text else ""  # pyright: ignore


def _default(node: ast.expr | None) -> str:
    """As it is written in YAML."""
    if node is None:
        return ""
    if isinstance(node, ast.Constant):
        names = {None: "null", True: "true", False: "false", "???": ""}
        return (
            names.get(node.value, str(node.value))
            if not isinstance(node.value, int | float) or isinstance(node.value, bool)
            else ast.unparse(node)
        )
    if isinstance(node, ast.Call):  # field(default_factory=…)
        inner = ast.unparse(node.keywords[0].value)
        return {"dict": "{}", "list": "[]"}.get(inner) or f"[{', '.join(eval(inner, dict(vars(sections)))())}]"
    return ast.unparse(node).replace("(", "[").replace(")", "]") if isinstance(node, ast.Tuple) else ast.unparse(node)


def _alternatives(annotation: str) -> list[str]:
    """The parts of a union, outside brackets."""
    return [part.strip() for part in re.split(r"\|(?![^\[]*\])", annotation)]


def _in_words(annotation: str) -> str:
    if annotation == "None":
        return "null"
    if match := re.fullmatch(r"Literal\[(.*)\]", annotation):
        return ", ".join(part.strip().strip("'\"") for part in match[1].split(","))
    if match := re.fullmatch(r"list\[(.*)\]", annotation):
        return f"a list of {' or '.join(map(_in_words, _alternatives(match[1])))}"
    if annotation.startswith(("dict", "Mapping")) or annotation.endswith("Config"):
        return "a group of keys"
    if annotation.startswith(("tuple", "Sequence")):
        return "a list of numbers"
    return WORDS.get(annotation, "a group of keys, with its own `_target_`")


def _arguments_section(docstring: str) -> dict[str, str]:
    """Name -> text of a docstring's `Args:`; names that stand together share it."""
    match = re.search(r"^Args:\n((?:(?: .*)?\n?)*)", docstring, re.MULTILINE)
    texts: dict[str, str] = {}
    for entry in re.findall(r"^    (\w[\w, ]*): ((?:.*)(?:\n {5,}.*)*)", match[1] if match else "", re.MULTILINE):
        for name in entry[0].split(","):
            text = " ".join(entry[1].split())
            texts[name.strip()] = text[:1].upper() + text[1:]
    return texts
