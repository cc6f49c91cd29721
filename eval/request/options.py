"""Options that the commands of `eval/` share, and how the text of an option or a table's cell becomes a value."""

import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import torch
import typer

from data_prep.model.geometry import Size
from eval.request.placement import OffloadName, WeightsName
from eval.request.request import AdapterUse, Control, Focus
from eval.request.sizes import SizeLimits
from train.record.lookup import find_adapter

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = "bfloat16" if CUDA else "float32"

DtypeName = Literal["bfloat16", "float16", "float32"]


def parse_size(text: str) -> Size:
    """`768x512`, width first."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ValueError(f"must look like 768x512, got {text!r}")
    return Size(int(height), int(width))


def parse_adapter(text: str) -> AdapterUse:
    """`runs/mine` or `runs/mine:0.8`; looked up as `find_adapter` says, which raises `InputError`."""
    path, colon, weight = text.rpartition(":")
    if colon and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", weight, re.IGNORECASE):
        return AdapterUse(find_adapter(path), float(weight))
    return AdapterUse(find_adapter(text))


def parse_focus(text: str) -> Focus:
    """`0.5,0.5,0.25`: x, y, radius."""
    try:
        x, y, radius = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"must look like 0.5,0.5,0.25 (x, y, radius), got {text!r}") from None
    return Focus(x, y, radius)


def parse_control(text: str) -> Control:
    """`canny` or `canny:0.8`."""
    kind, colon, strength = text.partition(":")
    try:
        value = float(strength) if colon else 1.0
    except ValueError:
        raise ValueError(f"must look like canny:0.8, got {text!r}") from None
    return Control(kind, value)  # type: ignore[arg-type]  # it checks the kind


def with_options(*records: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command whose options are the fields of dataclasses, each declared there once: `Annotated[type, typer.Option(…)]`.

    The function is given one of each, then the options that are its own; who calls it names options.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        def command(**given: Any) -> None:
            bound = signature.bind(**given)
            bound.apply_defaults()
            values = bound.arguments
            made = [record(**{each.name: values.pop(each.name) for each in fields(record)}) for record in records]
            function(*made, **values)

        own = list(inspect.signature(function, eval_str=True).parameters.values())[len(records) :]
        declared = [
            inspect.Parameter(
                each.name, inspect.Parameter.KEYWORD_ONLY, default=_default(each), annotation=hints[each.name]
            )
            for record in records
            for hints in [get_type_hints(record, include_extras=True)]
            for each in fields(record)
        ]
        signature = inspect.Signature([each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*declared, *own)])
        command.__signature__, command.__doc__ = signature, function.__doc__  # type: ignore[attr-defined]
        command.__name__, command.__module__, command.__annotations__ = function.__name__, function.__module__, {}
        return command

    return decorate


def _default(field: Field[Any]) -> Any:
    return inspect.Parameter.empty if field.default is MISSING else field.default


def option(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser for typer, whose message then begins with the option's name."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return parsed


Model = Annotated[str, typer.Option(help="Folder (as named, or below $MODEL_DIR) or hub id of a base model.")]
Seed = Annotated[int, typer.Option(help="Of the noise, and of the choice of rows.")]
CfgScale = Annotated[
    float | None, typer.Option(help="Guidance of flow matching, 1 for none.", show_default="4 for flow matching")
]
MaxPixels = Annotated[
    int | None, typer.Option(help="Largest area of a picture, in pixels.", show_default="as the adapter was trained")
]
VisionPixels = Annotated[
    int | None,
    typer.Option(help="Area that the text encoder sees, in pixels.", show_default="as the adapter was trained"),
]
Device = Annotated[str, typer.Option(help="Where the models run.", show_default="cuda if there is one")]
Dtype = Annotated[DtypeName, typer.Option(help="Of the weights.", show_default="bfloat16 on cuda, float32 on cpu")]

Adapters = Annotated[
    list[AdapterUse] | None,
    typer.Option(
        parser=option(parse_adapter),
        metavar="PATH[:WEIGHT]",
        help="Run, checkpoint or safetensors file, as named or below $CHECKPOINT_DIR; repeatable, added up.",
        show_default="the base model",
    ),
]
EncoderDevice = Annotated[
    str | None, typer.Option(help="Where the text encoder and the VAE run.", show_default="as --device")
]
Offload = Annotated[
    OffloadName, typer.Option(help="What waits in CPU memory: unused parts, or the transformer's blocks too.")
]
Weights = Annotated[
    WeightsName, typer.Option(help="Of the transformer's layers: as --dtype, or rounded to fewer bits.")
]
Gguf = Annotated[Path | None, typer.Option(help="Read the transformer from this GGUF file.", show_default="no")]
VaeTiling = Annotated[
    bool, typer.Option("--vae-tiling", help="Encode and decode in tiles: large pictures, less memory.")
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the transformer's block: a slower first picture, faster steps.")
]
DepthModel = Annotated[
    str | None, typer.Option(help="Folder or hub id, for depth maps.", show_default="$DEPTH_MODEL, or V2-Small")
]


@dataclass(frozen=True)
class ModelOptions:
    """A base model, and the sizes of its pictures."""

    model: Annotated[
        str | None,
        typer.Option(
            help="Folder (as named, or below $MODEL_DIR) or hub id of the base model.", show_default="required"
        ),
    ] = None
    max_pixels: MaxPixels = None
    vision_pixels: VisionPixels = None
    depth_model: DepthModel = None

    @property
    def limits(self) -> SizeLimits:
        """The sizes.

        Raises:
            InputError: one is too small.
        """
        return SizeLimits(self.max_pixels, self.vision_pixels)


@dataclass(frozen=True)
class PlaceOptions:
    """The words of a `Placement`; None for what is usual."""

    device: Annotated[str | None, typer.Option(help="Where the models run.", show_default="cuda if there is one")] = (
        None
    )
    dtype: Annotated[
        DtypeName | None, typer.Option(help="Of the weights.", show_default="bfloat16 on cuda, float32 on cpu")
    ] = None
    encoder_device: EncoderDevice = None
    offload: Offload = "none"
    weights: Annotated[
        WeightsName | None,
        typer.Option(help="Of the transformer's layers: as --dtype, or rounded to fewer bits.", show_default="full"),
    ] = None
    gguf: Gguf = None
    vae_tiling: VaeTiling = False
    compile: Compile = False

    @property
    def words(self) -> dict[str, Any]:
        """All but the device, for `make_placement`."""
        words = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "device"}
        return words | {"weights": self.weights or "full"}
