"""How a field of an edit is asked for, declared once beside the field.

The command line, tables' columns, the page's form and the check of a request are made of it. `--repeat` takes fields by name.
"""

import json
import math
import re
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from data_prep.errors import InputError
from data_prep.model.geometry import Size

ModeName = Literal["edit", "img2img", "variation", "inpaint", "focus", "control", "control-inpaint", "invert", "turbo"]
MODES: tuple[ModeName, ...] = get_args(ModeName)
SamplerName = Literal["flow", "heun", "dpmpp-2m", "unipc", "lightning", "bridge", "bridge-white", "bridge-stochastic"]
ControlName = Literal["canny", "lines", "depth"]
SizingName = Literal["own", "upstream"]
AspectName = Literal["1:1", "16:9", "9:16", "2.4:1", "3:4", "4:3"]


@dataclass(frozen=True)
class Knob:
    """How a field is given: its help, its range and the modes that take it."""

    help: str = ""
    default: str = ""
    """The default value, in words."""
    least: float | None = None
    """Least value of a number, or least number of characters of a text."""
    most: float | None = None
    above: bool = False
    """Whether the least value itself is out of range."""
    modes: tuple[ModeName, ...] = MODES
    """The modes that take it."""
    needed: bool = False
    """Whether these modes need it."""
    parse: Callable[[str], Any] | None = None
    """Turns the text of an option or a cell into a value; by default the type does."""
    metavar: str | None = None
    option: str = ""
    """Name of the option and of the column, if it is not the field's name."""
    label: str = ""
    """Label on the web page; by default the field's name."""

    def check(self, name: str, value: Any) -> None:
        """Whether a value is one.

        Raises:
            InputError: it is out of its range.
        """
        if isinstance(value, str):
            _check_text(name, value, self.most)
        elif isinstance(value, int | float) and not self.takes(value):
            start = "(" if self.above else "["
            raise InputError(f"{name} must be in {start}{self.least}, {self.most}], got {value}")

    def takes(self, value: float) -> bool:
        """Whether a number is in range."""
        least, most = self.least, self.most
        return least is None or most is None or (least <= value <= most and not (self.above and value == least))


def _check_text(name: str, text: str, most: float | None) -> None:
    if most is not None and len(text) > most:
        raise InputError(f"{name} has {len(text):,} characters, at most {most:,} are taken")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name} is not UTF-8 text") from None


@dataclass(frozen=True)
class Declared:
    """A field that is a knob."""

    field: str
    type: Any
    """Without None and, of several, that of one."""
    knob: Knob
    several: bool = False
    """Whether the field holds any number of values."""

    @property
    def name(self) -> str:
        """Name of its option and its column."""
        return self.knob.option or self.field

    @property
    def label(self) -> str:
        """Label on the web page."""
        return self.knob.label or self.field.replace("_", " ").capitalize()

    def parse(self, text: str) -> Any:
        """A value, of an option's text.

        Raises:
            ValueError: it is none.
        """
        if self.knob.parse:
            return self.knob.parse(text)
        return self.type(text) if self.type in (int, float) else text

    def parse_cell(self, text: str) -> Any:
        """The field's value, of a table's cell; several are a JSON list.

        Raises:
            ValueError: it is none.
        """
        return tuple(self.parse(each) for each in cell_texts(text)) if self.several else self.parse(text)


def declared(record: type) -> Iterator[Declared]:
    """The fields of a dataclass that are knobs, in order."""
    hints = get_type_hints(record, include_extras=True)
    for each in fields(record):
        if get_origin(hints[each.name]) is not Annotated:
            continue
        kind, knob = get_args(hints[each.name])
        several = get_origin(kind) is Sequence
        kinds = [some for some in get_args(kind) if some is not type(None)]
        if get_origin(kind) in (Union, types.UnionType) or several:
            kind = kinds[0]
        yield Declared(each.name, kind, knob, several)


def cell_texts(text: str) -> list[str]:
    """One text, or those of a JSON list.

    Raises:
        ValueError: it begins like a list and is none.
    """
    if not text.startswith("["):
        return [text]
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{text!r} looks like a JSON list but is not one: {error}") from None
    return [str(each) for each in values]


def split_weight(text: str) -> tuple[str, float]:
    """`mine:0.8` as name and weight, which is 1 where no number follows."""
    name, colon, weight = text.rpartition(":")
    if colon and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", weight, re.IGNORECASE):
        return name, float(weight)
    return text, 1.0


@dataclass(frozen=True)
class AdapterUse:
    """An adapter, and how much of it."""

    path: Path
    """A checkpoint folder or a safetensors file."""
    weight: float = 1.0
    """Multiplies its contribution; 0 is as if it were not there."""

    def __post_init__(self):
        if not math.isfinite(self.weight):
            raise InputError(f"the weight of {self.path} must be a number, got {self.weight}")

    @classmethod
    def parse(cls, text: str) -> "AdapterUse":
        """`runs/mine` or `runs/mine:0.8`; looked up as `find_adapter` says, which raises `InputError`."""
        from train.record.lookup import find_adapter

        name, weight = split_weight(text)
        return cls(find_adapter(name), weight)


@dataclass(frozen=True)
class Focus:
    """A disc that an edit is limited to, with a soft rim. In shares of the picture: x of its width, y of its height, radius of
    its shorter side."""

    x: float = 0.5
    y: float = 0.5
    radius: float = 0.25

    def __post_init__(self):
        for name in ("x", "y", "radius"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"focus {name} must be in [0, 1], got {getattr(self, name)}")
        if self.radius == 0:
            raise InputError("focus radius must be more than 0")

    @classmethod
    def parse(cls, text: str) -> "Focus":
        """`0.5,0.5,0.25`: x, y, radius."""
        try:
            x, y, radius = (float(part) for part in text.split(","))
        except ValueError:
            raise ValueError(f"must look like 0.5,0.5,0.25 (x, y, radius), got {text!r}") from None
        return cls(x, y, radius)


@dataclass(frozen=True)
class Control:
    """A map made of the first image and given as a further reference."""

    kind: ControlName
    """Edges by Canny, lines as a drawing would have them, or depth."""
    strength: float = 1.0
    """0: as if it were not there, 1: as the model takes it; between and beyond by extrapolation, in [0, 2]. Where all of several
    are 1, the model sees them together; else each by itself, and their effects are added."""

    def __post_init__(self):
        if self.kind not in get_args(ControlName):
            raise InputError(f"a control is one of {', '.join(get_args(ControlName))}, got {self.kind!r}")
        if not 0 <= self.strength <= 2:
            raise InputError(f"the strength of {self.kind} must be in [0, 2], got {self.strength}")

    @classmethod
    def parse(cls, text: str) -> "Control":
        """`canny` or `canny:0.8`."""
        kind, colon, strength = text.partition(":")
        try:
            value = float(strength) if colon else 1.0
        except ValueError:
            raise ValueError(f"must look like canny:0.8, got {text!r}") from None
        return cls(kind, value)  # type: ignore[arg-type]  # it checks the kind


def parse_size(text: str) -> Size:
    """`768x512`, width first."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ValueError(f"must look like 768x512, got {text!r}")
    return Size(int(height), int(width))
